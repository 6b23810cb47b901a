"""`uni-moe report`: what a mixture does with rows, as one page with figures."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .common import BYTES, load_checkpoint, new_command, not_negative, positive


def add_command(commands: Any) -> None:
    """Options of `uni-moe report`."""
    parser = new_command(
        commands,
        "report",
        "Show what the mixture does with rows: routing, specialisation, connectors; JSON, figures and one page.",
        run,
        takes_checkpoint=True,
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="rows, as training takes them")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="where page and figures go")
    parser.add_argument("--compare", metavar="OTHER", help="a checkpoint from before a stage, on the same rows")
    parser.add_argument("--modality", nargs="+", metavar="NAME", help="only rows with one of these, or text")
    parser.add_argument("--without", nargs="*", metavar="EXPERT", help="take out only these (default: each; '': none)")
    parser.add_argument("--limit", type=positive, default=256, metavar="N", help="rows, spread over the file (256)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="rows at once (default: 8)")
    parser.add_argument(
        "--examples", type=not_negative, default=6, metavar="N", help="rows token by token (default: 6)"
    )
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *BYTES], help="default: as saved")


def run(args: argparse.Namespace) -> None:
    """Writes the report and prints what is worth knowing first."""
    check_folder(args.output)
    from ..insight.figures import figure_module
    from ..insight.report import routing_report
    from ..insight.report_page import findings

    figure_module()  # before an hour is spent
    model, processor = load_checkpoint(args)
    other = None
    if args.compare:
        other, _ = load_checkpoint(argparse.Namespace(**{**vars(args), "checkpoint": args.compare}))
    report = routing_report(
        model,
        processor,
        args.data,
        compare=other,
        modalities=args.modality,
        without=None if args.without is None else [name for name in args.without if name],
        limit=args.limit,
        batch_size=args.batch_size,
        num_examples=args.examples,
        names=(args.checkpoint, args.compare or ""),
    )
    written = report.save(args.output)
    for line in [*findings(report.data), *report.notes, f"The page is {written}."]:
        sys.stdout.write(line + "\n")


def check_folder(folder: Path) -> None:
    """
    Before an hour is spent.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output '{folder}' cannot be made a folder ({error.strerror}); name another one.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output '{folder}' cannot be written to; name another one.")


__all__ = ["add_command", "run"]
