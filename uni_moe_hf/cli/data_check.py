"""`uni-moe data check`: the rows that training could not use, and why."""

import argparse
import sys
from collections import Counter
from typing import Any

from .common import load_config


MAX_LISTED = 100  # rows that are named one by one


def add_command(commands: Any) -> None:
    """Options of `uni-moe data check`."""
    data = commands.add_parser("data", help="Look at training data.", description="Look at training data.")
    parser = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="List the rows that training could not use.", description="List the rows training could not use."
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="files, a folder or a data set of rows")
    parser.add_argument("--media-root", metavar="DIR", help="where relative paths start (default: beside the file)")
    parser.add_argument("--split", default="train", help="of a data set (default: train)")
    parser.add_argument("--config", metavar="NAME", help="of a data set that has several")
    parser.add_argument("--columns", nargs="+", metavar="NAME=WHAT", help="such as photo=image label=answer")
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="what is asked about plain media")
    parser.add_argument("--model", metavar="CHECKPOINT", help="whose towers they are for (default: all)")
    parser.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    parser.add_argument("--no-decode", action="store_true", help="look for media files without opening them")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where a row is bad."""
    from ..training.data import MODALITIES, check_rows

    modalities = load_config(args.model).modalities if args.model else MODALITIES
    source = args.source[0] if len(args.source) == 1 else args.source
    reading = {name: getattr(args, name) for name in ("split", "config", "columns", "question", "media_root")}
    count, unread, kinds = 0, Counter(), Counter()
    for number, reason in check_rows(source, modalities, args.voice, not args.no_decode, unread, kinds, **reading):
        if count < MAX_LISTED:
            sys.stdout.write(f"row {number}: {reason}\n")
        count += 1
    if count > MAX_LISTED:
        sys.stdout.write(f"... and {count - MAX_LISTED} more\n")
    for name, rows in unread.items():
        sys.stdout.write(f"nothing is made of the field '{name}' ({rows} row{'s' * (rows != 1)})\n")
    held = ", ".join(f"{rows} of {kind}" for kind, rows in kinds.most_common())
    sys.stdout.write(f"rows that can be used: {held or 'none'}\n")
    named = " ".join(args.source)
    sys.stdout.write(f"{named}: {f'{count} rows cannot be used' if count else 'every row can be used'}\n")
    return int(count > 0)
