"""`uni-moe data check`: the rows that training could not use, and why."""

import argparse
import sys
from typing import Any

from .common import load_config


def add_command(commands: Any) -> None:
    """Options of `uni-moe data check`."""
    data = commands.add_parser("data", help="Look at training data.", description="Look at training data.")
    parser = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="List the rows that training could not use.", description="List the rows training could not use."
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="rows as .json, .jsonl or .parquet; media relative to it")
    parser.add_argument("--model", metavar="CHECKPOINT", help="whose towers they are for (default: all)")
    parser.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    parser.add_argument("--no-decode", action="store_true", help="look for media files without opening them")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where a row is bad."""
    from ..training.data import MODALITIES, check_rows

    modalities = load_config(args.model).modalities if args.model else MODALITIES
    count = 0
    for number, reason in check_rows(args.file, modalities, args.voice, not args.no_decode):
        sys.stdout.write(f"row {number}: {reason}\n")
        count += 1
    sys.stdout.write(f"{args.file}: {f'{count} rows cannot be used' if count else 'every row can be used'}\n")
    return int(count > 0)
