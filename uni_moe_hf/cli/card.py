"""`uni-moe card`: the page of a checkpoint on the Hub."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import new_command, register


def add_command(commands: Any) -> None:
    """Options of `uni-moe card`."""
    parser = new_command(
        commands,
        "card",
        "Write or complete the README.md of a checkpoint: how to ask it, its scores, its routing figures.",
        run,
    )
    parser.add_argument("folder", metavar="CHECKPOINT", type=Path, help="a folder")
    parser.add_argument("--report", metavar="DIR", help="what `uni-moe report --output DIR` left")
    parser.add_argument("--results", metavar="FILE.json", help="what `uni-moe evaluate --json FILE.json` wrote")
    parser.add_argument("--name", metavar="REPOSITORY", help="such as me/my-model (default: the card's title)")


def run(args: argparse.Namespace) -> None:
    """Writes the card and says where."""

    register()
    from ..insight.card import complete_card

    sys.stdout.write(f"{complete_card(args.folder, args.report, args.results, args.name)}\n")
