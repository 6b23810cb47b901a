"""`uni-moe doctor`: what is wrong with a checkpoint, one line each."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from .common import BYTES, load_checkpoint, new_command, positive, register


def add_command(commands: Any) -> None:
    """Options of `uni-moe doctor`."""
    parser = new_command(
        commands,
        "doctor",
        "Look for what goes wrong without a word; exit code 1 where something is wrong.",
        run,
        takes_checkpoint=True,
    )
    parser.add_argument("--data", metavar="FILE", help="rows with answers: is each modality really used?")
    parser.add_argument(
        "--limit", type=positive, default=64, metavar="N", help="rows, spread over the file (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *BYTES], help="default: as saved")


def run(args: argparse.Namespace) -> int:
    """Prints the findings."""
    register()
    from ..insight.doctor import WRONG, examine

    checks = examine(args.checkpoint, lambda: load_checkpoint(args), args.data, args.limit)
    if args.json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{check}\n" for check in checks))
        if args.data is None and WRONG not in {check.state for check in checks}:
            sys.stdout.write("       Rows with answers (--data FILE) show whether each modality is really used.\n")
    return int(WRONG in {check.state for check in checks})


__all__ = ["add_command", "run"]
