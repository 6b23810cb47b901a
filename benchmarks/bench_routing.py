"""
What `record_routing` adds to a forward pass and to a training step, as a ratio inside one run.

    python benchmarks/bench_routing.py [--repeats 15] [--output benchmarks/results/routing.md]

The two variants alternate, so that whatever else the machine does meets both; medians of their quotients are printed,
with the middle half of them.
"""

import argparse
import platform
import statistics
import time
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path

import torch
from comparing import alternate, publish, quotient

from uni_moe_hf import UniMoEConfig, UniMoEForConditionalGeneration, record_routing


SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "mid": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8},
}
TOKENS = {"tiny": (4, 64), "mid": (4, 256)}


def seconds(model: torch.nn.Module, inputs: dict, train: bool, record: bool) -> float:
    """One forward pass, or one step without an optimiser, with or without counting."""
    with record_routing(model) if record else nullcontext():
        start = time.perf_counter()
        if train:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            model.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                model(**inputs)
        return time.perf_counter() - start


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"`record_routing`, {date.today()}, torch {torch.__version__}, {platform.machine()}, 1 thread, float32, "
        f"4 layers, 4 experts, top 2, shared base, LoRA rank 8; {args.repeats} alternating repeats.",
        "",
        "| shape | tokens | pass | plain, median ms | recorded / plain, median (middle half) |",
        "|---|--:|---|--:|--:|",
    ]
    for name, shape in SHAPES.items():
        text = {"vocab_size": 1000, "num_experts": 4, "shared_expert_base": True, "pad_token_id": 0, **shape}
        model = UniMoEForConditionalGeneration(UniMoEConfig(text_config=text))
        ids = torch.randint(3, 1000, TOKENS[name])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for kind in ("forward", "forward and backward"):
            step = partial(seconds, model, inputs, kind != "forward")
            plain, recorded = alternate(partial(step, False), partial(step, True), args.repeats)
            lines.append(
                f"| {name} | {ids.numel()} | {kind} | {1000 * statistics.median(plain):.1f} "
                f"| {quotient(recorded, plain, digits=3)} |"
            )
    publish(lines, args.output)


if __name__ == "__main__":
    main()
