"""
The demo's three stages without a feature cache, with one that they fill, and with a warm one: seconds, loading and
saving included.

    make demo
    python benchmarks/demo_cache.py outputs/demo [--output benchmarks/results/demo_cache.md]
"""

import argparse
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from comparing import publish


sys.path.append(str(Path(__file__).parents[1] / "examples/demo"))
import run


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demo", type=Path, help="what `make demo` left")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # as the demo does
    stages = {"1": run.stage1, **{f"2 {name}": run.stage2 for name in run.EXPERTS}, "3": run.stage3}
    cached, seconds = run.cached, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("data", "parts"):
            (root / part).symlink_to((args.demo / part).resolve())
        for kind in ("none", "filled", "warm"):
            run.cached = cached if kind != "none" else lambda root: []
            for name, stage in stages.items():
                start = time.time()
                stage(root, *name.split()[1:])
                seconds[kind, name] = time.time() - start
    names = [*stages, "all"]
    lines = [
        f"The demo's stages by feature cache, {date.today()}, torch {torch.__version__}, {os.cpu_count()} cores; one "
        "run of each.",
        "",
        f"| cache | {' | '.join(names)} | quotient |",
        f"|---|{'--:|' * (len(names) + 1)}",
    ]
    for kind in ("none", "filled", "warm"):
        seconds[kind, "all"] = sum(seconds[kind, name] for name in stages)
        told = " | ".join(f"{seconds[kind, name]:.0f}" for name in names)
        lines.append(f"| {kind} | {told} | {seconds[kind, 'all'] / seconds['none', 'all']:.2f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
