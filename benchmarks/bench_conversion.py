"""
Peak memory and time of `uni-moe convert` on a synthetic checkpoint, each run a process of its own.

    python benchmarks/bench_conversion.py [--layers 18] [--output benchmarks/results/conversion.md]

The peak is what `/usr/bin/time -v` calls the maximum resident set size. The bound it is held to: the largest shard,
the largest layer's experts, and 300 MB.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from comparing import publish
from originals import write_original


MEGABYTE = 1e6
# A process of its own between the two: a child begins with its parent's peak, and this one's is large.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def run(arguments: dict, output: Path, *options: str) -> tuple[float, float]:
    """Peak in bytes and seconds of one conversion."""
    command = [sys.executable, "-m", "uni_moe_hf.cli", "convert", "--output", str(output), *options]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return float(done.stdout), time.perf_counter() - start


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2752)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        arguments = write_original(
            folder / "in",
            layers=args.layers,
            shards=args.shards,
            hidden=args.hidden,
            inner=args.inner,
            vocab=32000,
        )
        sizes = [file.stat().st_size for file in arguments["base"].glob("*.bin")]
        layer = 4 * 3 * args.hidden * args.inner * 4
        bound = max(sizes) + layer + 300 * MEGABYTE
        lines = [
            f"`uni-moe convert`, {date.today()}, torch {torch.__version__}, {platform.machine()}: a speech model of "
            f"{args.layers} layers, 4 experts, hidden {args.hidden}, intermediate {args.inner}, float32.",
            "",
            f"Base: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / MEGABYTE:.0f} MB; a "
            f"layer's experts {layer / MEGABYTE:.0f} MB; bound {bound / MEGABYTE:.0f} MB.",
            "",
            "| options | run | peak, MB | of the bound | seconds |",
            "|---|--:|--:|--:|--:|",
        ]
        for options in ((), ("--lora", "keep"), ("--dtype", "bfloat16")):
            for number in range(args.repeats):
                peak, seconds = run(arguments, folder / f"out-{'-'.join(options)}-{number}", *options)
                over = " DISAGREES" if peak > bound else ""
                lines.append(
                    f"| {' '.join(options) or 'default'} | {number + 1} | {peak / MEGABYTE:.0f}{over} "
                    f"| {peak / bound:.2f} | {seconds:.1f} |"
                )
    publish(lines, args.output)


if __name__ == "__main__":
    main()
