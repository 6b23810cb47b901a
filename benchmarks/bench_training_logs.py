"""
What [`UniMoESFTTrainer`] adds to a training step of plain `SFTTrainer`, as a ratio inside one run.

    python benchmarks/bench_training_logs.py [--repeats 15] [--output benchmarks/results/training_logs.md]

Both train the same mixture on the same batch, of the demo's size; they take turns, so that whatever else the machine
does meets both.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path

import torch
from comparing import alternate, publish, quotient
from datasets import Dataset
from trl import SFTTrainer

from uni_moe_hf import UniMoESFTTrainer, prepare_stage, record_routing, sft_config


sys.path.append(str(Path(__file__).parents[1] / "modeling_tests"))
from tiny import labels_of, make_inputs, tiny_model, tiny_processor


ROWS = (("image", 40), ("speech", 30), ("audio", 50), ("video", 20)) * 8


def trainer(kind: type, folder: Path) -> SFTTrainer:
    text = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "shared_expert_base": True}
    model = tiny_model(text)
    args = sft_config(
        "moe", folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True
    )
    made = kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}]),
        processing_class=tiny_processor(model.config),
        data_collator=lambda rows: rows,
        peft_config=prepare_stage(model, "moe"),
    )
    made.create_optimizer()
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # set by the loop that is left out here
    return made


def seconds(made: SFTTrainer, batch: dict, steps: int, extras: bool) -> float:
    """Steps, and what is logged of them at their end."""
    with ExitStack() as stack:
        if extras:
            stack.enter_context(made._losses)
            made._routing = stack.enter_context(record_routing(made.model))
        start = time.perf_counter()
        for _ in range(steps):
            made.training_step(made.model, dict(batch), num_items_in_batch=None)
            made.optimizer.step()
            made.optimizer.zero_grad()
        made.log({"loss": 0.0})
        return (time.perf_counter() - start) / steps


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = (trainer(kind, Path(folder)) for kind in (SFTTrainer, UniMoESFTTrainer))
    lines = [
        f"`UniMoESFTTrainer` beside `SFTTrainer`, {date.today()}, torch {torch.__version__}, {platform.machine()}, 1 "
        f"thread, float32; stage 3 of a tiny mixture, media in every row, {args.steps} steps for each log, "
        f"{args.repeats} alternating repeats; step, optimiser and log.",
        "",
        "| rows | tokens | plain, ms a step | ours / plain, median (middle half) |",
        "|--:|--:|--:|--:|",
    ]
    for rows in (4, 8, 32):
        batch = make_inputs(plain.model.config, *ROWS[:rows])
        batch["labels"] = labels_of(plain.model.config, batch)
        first = partial(seconds, plain, batch, args.steps, False)
        second = partial(seconds, ours, batch, args.steps, True)
        slow, fast = alternate(second, first, args.repeats)
        lines.append(
            f"| {rows} | {batch['input_ids'].numel()} | {1000 * statistics.median(fast):.1f} "
            f"| {quotient(slow, fast, digits=3)} |"
        )
    publish(lines, args.output)


if __name__ == "__main__":
    main()
