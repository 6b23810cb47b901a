"""
Where the time of a training step goes, and what the settings cost that one can choose. Ratios are of one run, in which
the variants take turns.

    python benchmarks/bench_training.py [--size real] [--only parts,cache] [--output benchmarks/results/training.md]

Sizes: "real" has the shapes of SmolLM2-135M, DINOv2-small at 112 pixels, Whisper tiny and YAMNet, as in
`examples/real_parts`, with random weights; "middle" has an LLM of 8 layers of 512; "tiny" is for tests. Rows hold a
picture, four seconds of speech or of sound, or none, as files.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from comparing import WARM_UP, publish
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    logging,
)
from trl import SFTTrainer

from uni_moe_hf import (
    FeatureCache,
    UniMoEConfig,
    UniMoEDataCollator,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    build_processor,
    encode_rows,
    prepare_stage,
    sft_config,
)
from uni_moe_hf.hub.feature_extraction_uni_moe import YamnetFeatureExtractor


sys.path.append(str(Path(__file__).parents[1] / "modeling_tests"))
from tiny import tiny_tokenizer


SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
    "middle": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 8, "vocab_size": 8192},
    "real": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
}
# Width, layers, heads and inner width of the towers for pictures and speech.
TOWERS = {"tiny": (32, 2, 4, 64), "middle": (384, 12, 6, 1536), "real": (384, 12, 6, 1536)}
STAGES = {1: "connectors", 2: "experts", 3: "moe"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("image", "speech", "audio", "image")


def model_of(
    size: str, stage: int, dtype: str, device: str, cut: bool = True, **text: Any
) -> UniMoEForConditionalGeneration:
    """Random weights: dense for stages 1 and 2, else four experts on one base, unless `text` says so."""
    torch.manual_seed(0)
    shape = SIZES[size]
    width, layers, heads, inner = TOWERS[size]
    dense = {"mlp_layer_types": ["dense"] * shape["num_hidden_layers"]}
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    speech = {"d_model": width, "encoder_layers": min(layers, 4), "decoder_layers": min(layers, 4)}
    speech |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads, "num_mel_bins": 80}
    speech |= {"encoder_ffn_dim": inner, "decoder_ffn_dim": inner, "vocab_size": 51865}
    qformer = {"hidden_size": min(width, 256), "intermediate_size": inner, "num_hidden_layers": 2}
    config = UniMoEConfig(
        text_config={**shape, "tie_word_embeddings": True, "expert_lora_rank": 16, "pad_token_id": 0}
        | (dense if stage < 3 else {"shared_expert_base": True, "num_experts": 4})
        | text,
        vision_config={**tower, "intermediate_size": inner, "image_size": 112, "patch_size": 14},
        speech_config=speech,
        audio_config={"model_type": "yamnet"},
        audio_connector_config={**qformer, "num_attention_heads": 4},
        tie_word_embeddings=True,
        num_speech_query_tokens=16,
        num_audio_query_tokens=16,
        cut_speech_windows=cut,
    )
    with torch.device(device):
        model = UniMoEForConditionalGeneration(config).to(DTYPES[dtype])
    for layer in model.model.language_model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.float()  # as where a mixture is loaded in half precision
    return model


def write_rows(folder: Path, count: int) -> list[dict]:
    """A picture, speech or sound in each row, and a few words to learn."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        name = folder / f"{index}.{'png' if kind == 'image' else 'wav'}"
        if kind == "image":
            Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(name)
        else:
            soundfile.write(name, 0.1 * generator.standard_normal(4 * 16000), 16000)
        content = [{"type": kind, "path": str(name)}, {"type": "text", "text": "what is this " * 4}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a bird red blue bell " * 2}]}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    return rows


def processor_of(model: UniMoEForConditionalGeneration) -> Any:
    return build_processor(model.config, tiny_tokenizer(), audio_feature_extractor=YamnetFeatureExtractor())


def trainer_of(model: torch.nn.Module, stage: int, folder: Path, processor: Any, **settings: Any) -> UniMoESFTTrainer:
    """Ready for single steps."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    defaults = {"use_cpu": on_cpu, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    made = UniMoESFTTrainer(
        model=model,
        args=sft_config(STAGES[stage], folder, **{**defaults, "disable_tqdm": True, **settings}),
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}]),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor),
        peft_config=prepare_stage(model, STAGES[stage], **({"modalities": ["image"]} if stage == 2 else {})),
    )
    return ready(made)


def ready(made: SFTTrainer) -> SFTTrainer:
    made.create_optimizer()
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # set by the loop that is left out here
    return made


def step(made: SFTTrainer, batch: dict | Callable[[], dict]) -> float:
    """Seconds of a step, and of making its batch where that is a function."""
    start = now()
    made.training_step(made.model, dict(batch() if callable(batch) else batch), num_items_in_batch=None)
    made.optimizer.step()
    made.optimizer.zero_grad()
    return now() - start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


def in_turn(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, in changing order, warmed up."""
    seconds = {name: [] for name in variants}
    for number in range(rounds + WARM_UP):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            spent = variants[name]()
            if number >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def ratio(seconds: list[float], to: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(seconds, to, strict=True)):.2f}"


# ---- by part ----

PARTS = ("collator", "towers", "connectors", "decoder forward", "head and loss", "backward", "optimiser")


@contextmanager
def clocked(made: SFTTrainer, spent: Counter) -> Iterator[None]:
    """Adds up seconds by part, by hooks on the modules and around the backward pass."""
    encoder = next(module for module in made.model.modules() if hasattr(type(module), "run_towers"))
    names = {encoder.language_model: "decoder forward"}
    for name in ("vision", "speech", "audio"):
        names |= {getattr(encoder, f"{name}_tower"): "towers", getattr(encoder, f"{name}_connector"): "connectors"}
    begun: dict[torch.nn.Module, float] = {}
    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(lambda m, args: begun.__setitem__(m, now())))
        handles.append(
            module.register_forward_hook(lambda m, args, out: spent.update({names[m]: now() - begun.pop(m)}))
        )
    backward = made.accelerator.backward

    def clocked_backward(*args: Any, **kwargs: Any) -> None:
        start = now()
        backward(*args, **kwargs)
        spent["backward"] += now() - start

    made.accelerator.backward = clocked_backward
    try:
        yield
    finally:
        made.accelerator.backward = backward
        for handle in handles:
            handle.remove()


def by_part(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "Per cent of a step by part:", "", f"| stage | dtype | threads | s a step | {' | '.join(PARTS)} |"]
    lines.append("|" + "--:|" * (4 + len(PARTS)))
    rows = write_rows(folder, args.rows)
    for stage in (1, 3):
        for dtype in DTYPES:
            for threads in (1, 2) if args.device == "cpu" else (2,):
                torch.set_num_threads(threads)
                model = model_of(args.size, stage, dtype, args.device)
                made = trainer_of(model, stage, folder / "out", processor_of(model))
                spent: Counter = Counter()
                for number in range(args.rounds + 1):
                    if number == 1:
                        spent.clear()
                    with clocked(made, spent):
                        start = now()
                        batch = made.data_collator(rows)
                        spent["collator"] += now() - start
                        start, before = now(), spent.total()
                        made.training_step(made.model, dict(batch), num_items_in_batch=None)
                        inside = spent.total() - before
                        spent["head and loss"] += now() - start - inside
                        start = now()
                        made.optimizer.step()
                        made.optimizer.zero_grad()
                        spent["optimiser"] += now() - start
                shares = " | ".join(f"{100 * spent[part] / spent.total():.0f}" for part in PARTS)
                each = spent.total() / args.rounds
                lines.append(f"| {stage} | {dtype} | {threads} | {each:.2f} | {shares} |")
    return lines


# ---- what settings cost ----


def kept(made: SFTTrainer, batch: dict) -> int:
    """Bytes that a forward pass keeps for backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.compute_loss(made.model, made._prepare_inputs(dict(batch)))
    del loss
    return sum(storages.values())


def checkpointing(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "Gradient checkpointing, step with it / without, and what is kept for backward:", ""]
    lines += ["| stage | dtype | time | MiB without | MiB with |", "|--:|---|--:|--:|--:|"]
    rows = write_rows(folder, args.rows)
    torch.set_num_threads(args.threads)
    for stage in STAGES:
        for dtype in DTYPES:
            made, batches, memory = {}, {}, {}
            for name, on in (("without", False), ("with", True)):
                model = model_of(args.size, stage, dtype, args.device, cut=False)  # as it is by default
                made[name] = trainer_of(model, stage, folder / name, processor_of(model), gradient_checkpointing=on)
                if on:  # what `train` does before the first step
                    made[name].model.gradient_checkpointing_enable()
                batches[name] = made[name].data_collator(rows)
                memory[name] = kept(made[name], batches[name]) / 2**20
            seconds = in_turn({name: partial(step, made[name], batches[name]) for name in made}, args.rounds)
            lines.append(
                f"| {stage} | {dtype} | {ratio(seconds['with'], seconds['without'])} | {memory['without']:.0f} | "
                f"{memory['with']:.0f} |"
            )
    return lines


def cached(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "Step from a warm feature cache / from media; collating alone; of collating what is not words:", ""]
    lines += ["| stage | rows of | dtype | s a step from media | step | collating | reading |"]
    lines += ["|--:|---|---|--:|--:|--:|--:|"]
    torch.set_num_threads(args.threads)
    everything = write_rows(folder, 4 * args.rows)
    for stage, kind in ((1, "all"), (2, "speech"), (3, "all")):
        rows = [row for row in everything if kind == "all" or row["messages"][0]["content"][0]["type"] == kind]
        rows = rows[: args.rows]
        for dtype in DTYPES:
            model = model_of(args.size, stage, dtype, args.device)
            processor = processor_of(model)
            cache = FeatureCache(folder / f"cache-{dtype}-{stage}", model, processor, fill=True)
            made = trainer_of(model, stage, folder / "out", processor)
            encode_rows(rows, model, made.data_collator, cache)
            collating: dict[str, list[float]] = {"media": [], "cache": []}

            def collate(which: str, made=made, rows=rows, cache=cache, collating=collating) -> dict:
                made.data_collator.processor.feature_cache = cache if which == "cache" else None
                start = now()
                batch = made.data_collator(rows)
                collating[which].append(now() - start)
                return batch

            variants = {which: partial(step, made, partial(collate, which)) for which in collating}
            seconds = in_turn(variants, args.rounds)
            words = [{"messages": [{**m, "content": m["content"][-1:]} for m in row["messages"]]} for row in rows]
            times = in_turn({"words": lambda: timed(lambda: made.data_collator(words))}, 10)["words"]  # noqa: B023
            of_words = statistics.median(times)
            media, stored = (statistics.median(collating[which]) - of_words for which in ("media", "cache"))
            lines.append(
                f"| {stage} | {kind} | {dtype} | {statistics.median(seconds['media']):.2f} | "
                f"{ratio(seconds['cache'], seconds['media'])} | {ratio(collating['cache'], collating['media'])} | "
                f"{stored / media:.2f} |"
            )
    return lines


def llava_of(size: str, dtype: str, device: str) -> LlavaForConditionalGeneration:
    """The library's own: the same LLM and the same tower for pictures, dense."""
    torch.manual_seed(0)
    width, layers, heads, inner = TOWERS[size]
    tower = CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        image_size=112, patch_size=14,
    )  # fmt: skip
    text = {"model_type": "llama", **SIZES[size], "tie_word_embeddings": True, "pad_token_id": 0}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=SIZES[size]["vocab_size"] - 1)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).to(DTYPES[dtype])


def against_dense(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = [
        "",
        "Stage 3 on rows of pictures / a dense Llava with LoRA of rank 16 on its feed-forward layers and 8 on",
    ]
    lines += ["its attention, by plain PEFT and TRL: the same LLM, tower, rows and optimiser:", ""]
    lines += ["| experts | dtype | tokens | s a dense step | ours / dense |", "|---|---|--:|--:|--:|"]
    torch.set_num_threads(args.threads)
    rows = [row for row in write_rows(folder, 2 * args.rows) if row["messages"][0]["content"][0]["type"] == "image"]
    for dtype in DTYPES:
        made, batches = {}, {}
        kinds = {"4, top-2, shared base": {}, "4, top-2, own bases": {"shared_expert_base": False}}
        for name, text in kinds.items():
            model = model_of(args.size, 3, dtype, args.device, **text)
            made[name] = trainer_of(model, 3, folder / "ours", processor_of(model))
            batches[name] = made[name].data_collator(rows)
        first = batches[next(iter(kinds))]
        dense = llava_of(args.size, dtype, args.device)
        image = made[next(iter(kinds))].data_collator.processor.image_token_id
        batch = {name: first[name].clone() for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
        batch["input_ids"][batch["input_ids"] == image] = dense.config.image_token_id
        lora = LoraConfig(
            target_modules=r".*language_model.*(self_attn|mlp)\.\w+_proj",
            r=8,
            rank_pattern={r".*mlp.*": 16},
            lora_alpha=16,
            lora_dropout=0.05,
            task_type="CAUSAL_LM",
        )
        arguments = {"use_cpu": args.device == "cpu", "bf16": False, "gradient_checkpointing": False}
        made["dense"] = ready(
            SFTTrainer(
                model=dense,
                args=sft_config("moe", folder / "dense", report_to="none", disable_tqdm=True, **arguments),
                train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}]),
                processing_class=tiny_tokenizer(),
                data_collator=lambda rows: rows,
                peft_config=lora,
            )
        )
        batches["dense"] = batch
        seconds = in_turn({name: partial(step, made[name], batches[name]) for name in made}, args.rounds)
        for name in kinds:
            lines.append(
                f"| {name} | {dtype} | {first['input_ids'].numel()} | {statistics.median(seconds['dense']):.2f} | "
                f"{ratio(seconds[name], seconds['dense'])} |"
            )
    return lines


WORDS = 32


def generation(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = [
        "",
        f"An answer of {WORDS} words to a prompt of 302, LoRA of stage 3 in place / a dense Llama of as many active",
        "weights with LoRA by PEFT:",
        "",
        "| experts | dtype | s of the dense one | ours / dense |",
        "|---|---|--:|--:|",
    ]
    torch.set_num_threads(args.threads)
    shape = SIZES[args.size]
    ids = torch.randint(3, shape["vocab_size"], (1, 302), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids.to(args.device), "attention_mask": torch.ones_like(ids).to(args.device)}
    length = {"max_new_tokens": WORDS, "min_new_tokens": WORDS, "do_sample": False}
    for dtype in DTYPES:
        models = {}
        for name, shared in (("4, top-2, shared base", True), ("4, top-2, own bases", False)):
            model = model_of(args.size, 3, dtype, args.device, shared_expert_base=shared)
            models[name] = get_peft_model(model, prepare_stage(model, "moe"))
        with torch.device(args.device):
            config = LlamaConfig(**shape | {"intermediate_size": 2 * shape["intermediate_size"]}, pad_token_id=0)
            dense = LlamaForCausalLM(config).to(DTYPES[dtype])
        ranks = {"r": 8, "rank_pattern": {r".*mlp.*": 16}, "lora_alpha": 16}
        models["dense"] = get_peft_model(
            dense, LoraConfig(target_modules=r".*(self_attn|mlp)\.\w+_proj", task_type="CAUSAL_LM", **ranks)
        )
        runs = {
            name: partial(timed, partial(model.eval().generate, **prompt, **length)) for name, model in models.items()
        }
        seconds = in_turn(runs, args.rounds)
        for name in list(models)[:-1]:
            lines.append(
                f"| {name} | {dtype} | {statistics.median(seconds['dense']):.2f} | "
                f"{ratio(seconds[name], seconds['dense'])} |"
            )
    return lines


# ---- growth ----


def growth(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "More experts, top-2: stage 3's step / that of four experts:", ""]
    lines += ["| bases | dtype | 16 experts | 64 experts |", "|---|---|--:|--:|"]
    torch.set_num_threads(args.threads)
    rows = write_rows(folder, args.rows)
    for shared in (True, False):
        for dtype in DTYPES:
            made, batches = {}, {}
            for experts in (4, 16, 64):
                model = model_of(
                    "tiny" if args.size == "tiny" else "middle", 3, dtype, args.device,
                    num_experts=experts, shared_expert_base=shared,
                )  # fmt: skip
                made[experts] = trainer_of(model, 3, folder / "out", processor_of(model))
                batches[experts] = made[experts].data_collator(rows)
            seconds = in_turn({n: partial(step, made[n], batches[n]) for n in made}, args.rounds)
            of_more = " | ".join(ratio(seconds[experts], seconds[4]) for experts in (16, 64))
            lines.append(f"| {'shared' if shared else 'own'} | {dtype} | {of_more} |")
    return lines + long_sounds(args) + idle_modalities(args, folder) + data_workers(args, folder)


def long_sounds(args: argparse.Namespace) -> list[str]:
    lines = ["", "A recording of speech, encoded without gradients (30 s windows): s, and MiB beyond the model's:", ""]
    lines += ["| seconds | s | s a window | MiB at most |", "|--:|--:|--:|--:|"]
    model = model_of(args.size, 1, "float32", args.device).eval()
    processor = processor_of(model)
    for length in (10, 60, 300, 600):
        sound = (0.1 * np.random.default_rng(0).standard_normal(length * 16000)).astype(np.float32)
        inputs = processor(speech=[sound], return_tensors="pt").to(args.device)
        times = []
        for _ in range(2):
            with torch.no_grad(), Peak(args.device) as peak:
                start = now()
                model.model.encode_media(**inputs)
                times.append(now() - start)
        windows = len(inputs["input_features"])
        lines.append(f"| {length} | {min(times):.2f} | {min(times) / windows:.2f} | {peak.mebibytes:.0f} |")
    return lines


class Peak:
    """Most memory that was taken while it was entered, beyond what was there; of the process on a CPU, by samples."""

    def __init__(self, device: str):
        self.on_gpu, self.mebibytes = device == "cuda", 0.0

    def taken(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.taken())

    def __enter__(self) -> "Peak":
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = self.taken()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        self.thread.join()
        self.mebibytes = (max(self.most, self.taken()) - self.before) / 2**20


def idle_modalities(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "Rows of words alone: a model with all towers / the same without any:", ""]
    lines += ["| stage | dtype | step |", "|--:|---|--:|"]
    words = [{"role": "user", "content": "what is this " * 20}, {"role": "assistant", "content": "a bird " * 10}]
    rows = [{"messages": words}] * args.rows
    for dtype in DTYPES:
        made = {}
        for name in ("all", "none"):
            model = model_of(args.size, 3, dtype, args.device)
            made[name] = trainer_of(model, 3, folder / "out", processor_of(model))
            if name == "none":
                encoder = next(module for module in made[name].model.modules() if hasattr(type(module), "run_towers"))
                for part in ("vision", "speech", "audio"):
                    delattr(encoder, f"{part}_tower")
                    delattr(encoder, f"{part}_connector")
        batch = made["all"].data_collator(rows)
        seconds = in_turn({name: partial(step, made[name], batch) for name in made}, args.rounds)
        lines.append(f"| 3 | {dtype} | {ratio(seconds['all'], seconds['none'])} |")
    return lines


def data_workers(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["", "Batches alone, by processes that make them; ms a row, start included:", ""]
    lines += ["| from | none | 1 | 2 | 4 |", "|---|--:|--:|--:|--:|"]
    torch.set_num_threads(1)
    rows = write_rows(folder, 32 * args.rows)
    model = model_of("tiny", 1, "float32", args.device)
    processor = processor_of(model)
    collator = UniMoEDataCollator(processor)
    cache = FeatureCache(folder / "cache", model, processor, fill=True)
    encode_rows(rows, model, collator, cache)
    for name, used in (("media", None), ("a feature cache", cache)):
        processor.feature_cache = used
        spent = []
        for workers in (0, 1, 2, 4):
            start = now()
            loader = DataLoader(rows, batch_size=args.rows, collate_fn=collator, num_workers=workers)
            count = sum(len(batch["input_ids"]) for batch in loader)
            spent.append(f"{1000 * (now() - start) / count:.1f}")
        lines.append(f"| {name} | {' | '.join(spent)} |")
    return lines


SECTIONS = {
    "parts": by_part,
    "checkpointing": checkpointing,
    "cache": cached,
    "dense": against_dense,
    "generation": generation,
    "growth": growth,
}


def main() -> None:
    """Prints tables, and writes them where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="real")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="where both are not measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.device == "cuda" and not torch.cuda.is_available():
        publish(["There is no GPU here, so nothing was measured on one."], args.output)
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    lines = [
        f"Training steps, {date.today()}, torch {torch.__version__}, {where}; parts of size '{args.size}', "
        f"{args.rows} rows a batch, {args.rounds} rounds, medians; step, optimiser and (where it says so) collator.",
    ]
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            lines += SECTIONS[name](args, Path(folder))
        if args.output:  # what was measured stays, should time run out
            args.output.write_text("\n".join(lines) + "\n")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
