"""
Does `uni-moe info --plan` estimate the memory that training takes? Peaks of stages, sizes and options on a CPU.

    python benchmarks/bench_memory.py [--only middle] [--output benchmarks/results/memory.md]

Each case is a process of its own that trains two steps of two batches through `UniMoESFTTrainer`, on rows with
pictures, speech and sound; its peak is the resident memory since the model was built, less what it was before. Sizes
are those of `bench_training.py`, and "large" with the shape of Qwen3-0.6B. The second table estimates sizes that
nobody could train here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import bench_training
import torch
from bench_training import STAGES, model_of, processor_of, trainer_of, write_rows
from comparing import publish
from transformers import AutoConfig

from uni_moe_hf import UniMoEConfig
from uni_moe_hf.recipes.planning import CHOICES, LIBRARIES, plan_choices, plan_stage


bench_training.SIZES["large"] = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072}
bench_training.SIZES["large"] |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
bench_training.SIZES["large"] |= {"head_dim": 128, "vocab_size": 151936}
bench_training.TOWERS["large"] = bench_training.TOWERS["real"]

BATCH = {"tiny": 4, "middle": 8, "real": 8, "large": 4}
# In a row of `write_rows`, of each kind.
CLIPS = {"image": 0.5, "speech": 0.25, "audio": 0.25}
# What the trainer is told, and what the plan is.
OPTIONS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "recompute": {"expert_activations": "recompute"},
    "own bases": {"shared_base": False},
}
# Of freed memory malloc keeps most; a peak should be what is needed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}


def cases(sizes: list[str]) -> list[tuple[str, int, str, str]]:
    """Size, stage, dtype and option."""
    made = []
    for size in sizes:
        for stage in STAGES:
            made += [(size, stage, dtype, "plain") for dtype in ("float32", "bfloat16")]
            made.append((size, stage, "float32", "checkpointing"))
        made += [(size, 3, "float32", "recompute"), (size, 3, "bfloat16", "own bases")]
    return made


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(size: str, stage: int, dtype: str, option: str) -> dict[str, float]:
    """In a process of its own: the peak, and what was estimated."""
    settings = OPTIONS[option]
    batch = BATCH[size]
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder), 4 * batch)
        before = resident()
        text = {} if settings.get("shared_base", True) else {"shared_expert_base": False}
        model = model_of(size, stage, dtype, "cpu", **text)
        model.config.text_config.expert_activations = settings.get("expert_activations", "save")
        processor = processor_of(model)
        config = model.config
        trainer = trainer_of(
            model, stage, Path(folder), processor,
            gradient_checkpointing=settings.get("gradient_checkpointing", False), max_steps=2,
            per_device_train_batch_size=batch, gradient_accumulation_steps=2, save_strategy="no",
        )  # fmt: skip
        trainer.train_dataset = rows
        lengths = [trainer.data_collator(rows[start : start + batch])["input_ids"].shape[1] for start in (0, batch)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        trainer.train()
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        learned = [(trainer.data_collator(rows[:batch])["labels"] != -100).sum().item() / batch]
    plan = plan_stage(
        config, STAGES[stage], batch, max(lengths), dtype, modalities=["image"] if stage == 2 else None,
        num_answer_tokens=round(max(learned)), clips=CLIPS, **settings,
    )  # fmt: skip
    return {"peak": peak - before, "libraries": before, "plan": plan.total - LIBRARIES, "tokens": max(lengths)}


def table(sizes: list[str]) -> list[str]:
    """All cases, each measured twice."""
    lines = ["| size | stage | dtype | option | rows x tokens | measured, GB | estimated, GB | quotient |"]
    lines += ["|---|---|---|---|--:|--:|--:|--:|"]
    worst, libraries = 1.0, []
    for case in cases(sizes):
        peaks = []
        for _ in range(2):
            command = [sys.executable, __file__, "--case", *map(str, case)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
            if done.returncode:
                sys.exit(f"{case}: {done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            peaks.append(found["peak"])
            libraries.append(found["libraries"])
        peak = sum(peaks) / 2
        quotient = found["plan"] / peak
        worst = max(worst, quotient, 1 / quotient)
        shown = ", ".join(f"{each / 1e9:.2f}" for each in peaks)
        size, stage, dtype, option = case
        lines.append(
            f"| {size} | {STAGES[stage]} | {dtype} | {option} | {BATCH[size]} x {found['tokens']} | {shown} | "
            f"{found['plan'] / 1e9:.2f} | {quotient:.2f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"Farthest apart: {100 * (worst - 1):.0f} %. Python and libraries alone: "]
    lines[-1] += f"{min(libraries) / 1e9:.2f} to {max(libraries) / 1e9:.2f} GB (estimated {LIBRARIES / 1e9:.2f})."
    return lines


CLIP_L = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
WHISPER_SMALL = {"model_type": "whisper", "d_model": 768, "encoder_layers": 12, "decoder_layers": 12}
WHISPER_SMALL |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072}
WHISPER_SMALL |= {"decoder_ffn_dim": 3072}
# Shapes as published; see each model's config.json on the Hub.
LLMS = {
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
    "Vicuna-7B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "Qwen3-8B": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}


def estimated(batch: int = 4, tokens: int = 1024) -> list[str]:
    """LLMs of three sizes with CLIP-L, Whisper small and BEATs, stage by stage."""
    lines = [f"| LLM | stage | {' | '.join(CHOICES)} |", f"|---|---|{'--:|' * len(CHOICES)}"]
    for name, text in LLMS.items():
        text = AutoConfig.for_model(**text).to_dict() | {"mlp_layer_types": ["dense"] * text["num_hidden_layers"]}
        config = UniMoEConfig(
            text_config=text,
            vision_config=CLIP_L,
            speech_config=WHISPER_SMALL,
            audio_config={"model_type": "beats"},
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        plans = plan_choices(config, batch_size=batch, num_tokens=tokens, device="cuda")
        for stage in STAGES.values():
            cells = [f"{each[stage].total / 1e9:.1f}" if stage in each else "" for each in plans.values()]
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="middle,real,large", help="sizes, with commas")
    parser.add_argument("--case", nargs=4, metavar=("SIZE", "STAGE", "DTYPE", "OPTION"), help="measure this one here")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.case:
        size, stage, dtype, option = args.case
        print(json.dumps(measure(size, int(stage), dtype, option)))
        return
    lines = [
        "# Memory of a training, estimated and measured",
        "",
        f"{date.today()}, torch {torch.__version__}, a CPU. `python benchmarks/bench_memory.py`; two runs each.",
        "",
        *table(args.only.split(",")),
        "",
        "## Sizes that were not trained here",
        "",
        "GB for one process, 4 rows of 1,024 tokens at once, four experts on one base, CLIP-L, Whisper small and ",
        "BEATs. Foretold for a GPU, where nothing of this was measured; kernels there keep somewhat less for dropout.",
        "",
        *estimated(),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
