"""
A training step and an answer of the original's code beside ours, as shipped, on the same weights and inputs; they take
turns.

    python benchmarks/against_original.py CODE PYTHON [--output benchmarks/results/against_original.md]

CODE is the folder `Uni_MoE` of HITsz-TMG/UMOE-Scaling-Unified-Multimodal-LLMs at f5e82dd, PYTHON an interpreter with
what it wants: torch 2.13.0, transformers 4.31.0, tokenizers 0.13.3, peft 0.4.0, accelerate 0.21.0, numpy 1.26.
The checkpoint is random, in the original's formats: 8 layers of 512, 4 experts, top-2, LoRA of rank 8; the towers are
the tests' own, so that the time is the LLM's. Rows: four, of 300 positions, 32 of them learned.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_training import DTYPES, in_turn, ready, step
from comparing import publish
from datasets import Dataset
from originals import write_original
from peft import PeftModel, get_peft_model
from transformers import AutoModel, logging

from uni_moe_hf import UniMoESFTTrainer, convert_checkpoint, prepare_stage, sft_config
from uni_moe_hf.training.feature_cache import INPUTS


sys.path.append(str(Path(__file__).parents[1] / "modeling_tests"))
from tiny import tiny_processor


IMAGE, SPEECH = -200, -300  # the original's placeholders
WORDS = 32


def write_checkpoint(folder: Path) -> dict[str, Path]:
    paths = write_original(folder, "speech", 8, 4, 2, 8, 16, hidden=512, inner=1376, vocab=8000, heads=8)
    for name, ours in (("clip", "vision_tower"), ("whisper", "speech_tower")):
        shutil.copytree(paths[ours], folder / name)
    return paths


def write_batch(folder: Path, rows: int = 4, length: int = 300) -> dict[str, torch.Tensor]:
    """As the original's collator gives it: a picture and a window of speech in each row, black frames for a video."""
    generator = torch.Generator().manual_seed(0)
    clip = json.loads((folder / "clip/config.json").read_text())
    patches = (clip["image_size"] // clip["patch_size"]) ** 2
    queries = json.loads((folder / "base/config.json").read_text())["query_tokens_size"]
    ids = torch.randint(3, 8000, (rows, length - patches - queries + 2), generator=generator)
    ids[:, 0], ids[:, 8], ids[:, 10] = 1, IMAGE, SPEECH
    labels = torch.full_like(ids, -100)
    labels[:, -WORDS:] = ids[:, -WORDS:]
    side = clip["image_size"]
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": torch.randn(rows, 3, side, side, generator=generator),
        "image_mask": torch.ones(rows, dtype=torch.bool),
        "videos": torch.zeros(rows, 8, 3, side, side),
        "video_mask": torch.zeros(rows, dtype=torch.bool),
        "input_features": torch.randn(rows, 1, 80, 3000, generator=generator) * 0.5,
        "features_mask": torch.ones(rows, 1, dtype=torch.long),
    }
    torch.save(batch, folder / "batch.pt")
    return batch


def ours_of(batch: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The same rows as our processor makes them: every placeholder as often as its clip has positions."""
    counts = {IMAGE: config.image_seq_length, SPEECH: config.num_speech_query_tokens}
    tokens = {IMAGE: config.image_token_id, SPEECH: config.speech_token_id}
    rows, targets = [], []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        rows.append([tokens.get(token, token) for token in ids for _ in range(counts.get(token, 1))])
        pairs = zip(ids, labels, strict=True)
        targets.append([label for token, label in pairs for _ in range(counts.get(token, 1))])
    made = {"input_ids": torch.tensor(rows), "labels": torch.tensor(targets)}
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made | {"pixel_values": batch["images"], "input_features": batch["input_features"].flatten(0, 1)}


class Original:
    """The original's code in a process of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path, dtype: str):
        command = [args.python, Path(__file__).parent / "original_worker.py", args.code, folder, dtype, args.threads]
        self.log = (folder / f"{dtype}.log").open("w")
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def ask(self, command: str) -> dict[str, Any]:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            self.log.flush()
            raise RuntimeError(f"The original's code has ended: {Path(self.log.name).read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def trainer_of(folder: Path, dtype: str) -> UniMoESFTTrainer:
    """Stage 3 as shipped, gradient checkpointing on, going on from the same weights."""
    model = AutoModel.from_pretrained(folder, dtype=DTYPES[dtype])
    model.config.text_config.expert_lora_dropout = 0.05
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": True, "report_to": "none"}
    made = UniMoESFTTrainer(
        model=get_peft_model(model, prepare_stage(model, "moe")),
        args=sft_config("moe", folder / "out", disable_tqdm=True, **settings),
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}]),
        processing_class=tiny_processor(),
    )
    made.model.gradient_checkpointing_enable()
    return ready(made)


@torch.no_grad()
def loss_of(folder: Path, batch: dict[str, torch.Tensor]) -> float:
    return PeftModel.from_pretrained(AutoModel.from_pretrained(folder), folder / "adapter").eval()(**batch).loss.item()


def answer(model: torch.nn.Module, prompt: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    words = model.generate(**prompt, do_sample=False, max_new_tokens=WORDS, min_new_tokens=WORDS)
    assert words.shape[1] == prompt["input_ids"].shape[1] + WORDS
    return time.perf_counter() - start


def compared(args: argparse.Namespace, folder: Path, dtype: str) -> list[str]:
    paths = write_checkpoint(folder)
    whole = write_batch(folder)
    for lora in ("keep", "merge"):
        convert_checkpoint(
            paths["base"], folder / lora, finetuned=paths["finetuned"], lora=lora,
            vision_tower=folder / "clip", speech_tower=folder / "whisper",
        )  # fmt: skip
    made = trainer_of(folder / "keep", dtype)
    model = AutoModel.from_pretrained(folder / "merge", dtype=DTYPES[dtype]).eval()
    batch = ours_of(whole, model.config)
    floats = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in batch.items()}
    media = {name: floats[name] for names in INPUTS.values() for name in names if name in floats}
    words = {name: tensor for name, tensor in floats.items() if name not in media}
    warm = words | {"tower_states": model.model.run_towers(**media)}
    prompt = {name: tensor[:1] for name, tensor in floats.items() if name != "labels"}
    original = Original(args, folder, dtype)
    try:
        lines = []
        if dtype == "float32":
            theirs, mine = original.ask("loss")["loss"], loss_of(folder / "keep", batch)
            lines.append(f"Losses of the same rows in float32: {theirs:.6f} there, {mine:.6f} here.")
            assert abs(theirs - mine) < 1e-4 * theirs, (theirs, mine)

        def ask(command: str) -> float:
            return original.ask(command)["seconds"]

        steps: dict[str, Callable[[], float]] = {"original": partial(ask, "step")}
        steps |= {"ours": partial(step, made, floats), "from a warm cache": partial(step, made, warm)}
        trained = in_turn(steps, args.rounds)
        answers = in_turn({"original": partial(ask, "generate"), "ours": partial(answer, model, prompt)}, 2)
    finally:
        original.close()
    slow = trained.pop("original")
    for name, seconds in trained.items():
        times = statistics.median(a / b for a, b in zip(slow, seconds, strict=True))
        what = f"training step, {name}" if name != "ours" else "training step"
        lines.append(
            f"| {what} | {dtype} | {statistics.median(slow):.2f} | {statistics.median(seconds):.2f} | {times:.2f} |"
        )
    slow, fast = answers["original"], answers["ours"]
    times = statistics.median(a / b for a, b in zip(slow, fast, strict=True))
    what = f"an answer of {WORDS} words"
    lines.append(f"| {what} | {dtype} | {statistics.median(slow):.2f} | {statistics.median(fast):.2f} | {times:.1f} |")
    return lines


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("code", type=Path)
    parser.add_argument("python", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    lines = [
        f"The original's code (f5e82dd, speech, gradient checkpointing on) beside ours, {date.today()}, torch "
        f"{torch.__version__}, {platform.machine()}, {args.threads} thread(s); random weights, {args.rounds} rounds, "
        "medians.",
        "",
    ]
    table = ["", "| | dtype | original, s | ours, s | times as fast |", "|---|---|--:|--:|--:|"]
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            found = compared(args, Path(folder), dtype)
        lines += [line for line in found if not line.startswith("|")]
        table += [line for line in found if line.startswith("|")]
    publish(lines + table, args.output)


if __name__ == "__main__":
    main()
