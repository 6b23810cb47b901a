"""
Families of LLMs as the decoder, tiny and random: every family against every check, what was seen in each cell.

    python benchmarks/bench_families.py [--only Qwen3,Phi-3] [--check experts] \
        [--output benchmarks/results/families.md]

A cell is "equal" where values agree bit for bit, or the largest difference as a share of the largest value; of 8 and
4 bits the relative error of the logits, since quantising loses something. A cell that failed says so. What each check
does is in `modeling_tests/families.py`.
"""

import argparse
import io
import logging
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers
from comparing import publish
from tqdm import tqdm


sys.path.append(str(Path(__file__).resolve().parents[1] / "modeling_tests"))

from families import CHECKS, FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--check", default="", help="part of a check's name")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(FAMILIES)
    checks = {title: check for title, check in CHECKS.items() if args.check in title}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    failed = 0
    lines = [
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        f"| family | `model_type` | {' | '.join(checks)} |",
        f"|---|---|{'---|' * len(checks)}",
    ]
    for name in tqdm(names, disable=None):
        cells = []
        for check in checks.values():
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # trainers print
                try:
                    cells.append(check(name, Path(folder)))
                except Exception as error:  # the others are still of interest
                    failed += 1
                    cells.append(f"FAILED: {type(error).__name__} {str(error).splitlines()[0][:80]}")
        lines.append(f"| {name} | `{FAMILIES[name][0]}` | {' | '.join(cells)} |")
    lines += ["", f"{len(names) * len(checks)} cells, {failed} failed."]
    publish(lines, args.output)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
