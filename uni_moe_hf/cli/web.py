"""`uni-moe web`: a checkpoint, or two beside each other, on a page in the browser."""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

from .common import add_loading, load_checkpoint, new_command, positive


def add_command(commands: Any) -> None:
    """Options of `uni-moe web`."""
    parser = new_command(
        commands,
        "web",
        "Open a page in the browser on which a checkpoint is asked, and its experts are seen at work.",
        run,
        takes_checkpoint=True,
    )
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second one, beside it")
    parser.add_argument(
        "--examples",
        metavar="ROWS",
        help="file of rows to try (default: data/test.jsonl beside the checkpoint, where there is one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to others (default: 127.0.0.1)")
    parser.add_argument("--port", type=positive, default=7860, help="default: 7860")
    add_loading(parser)
    parser.add_argument("--share", action="store_true", help="a public address by Gradio's servers")


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is stopped."""
    from ..hub.files_uni_moe import sentence_of
    from ..serving.web import Served, check_address, examples_of, modalities_of, serve

    check_address(args.host, args.port)
    names = [args.checkpoint, *([args.compare] if args.compare else [])]
    served = []
    for name in names:
        one = copy.copy(args)
        one.checkpoint = name
        # "outputs/demo/model" is long, and "model" says nothing.
        parts = Path(name).resolve().parts if Path(name).is_dir() else Path(name).parts
        served.append(Served("/".join(part for part in parts[-2:] if part != "/"), *load_checkpoint(one)))
    usual = Path(args.checkpoint).resolve().parent / "data/test.jsonl"
    examples: Any = ()
    try:
        if args.examples or usual.is_file():
            examples = examples_of(args.examples or usual, modalities_of(served))
    except (ValueError, OSError) as error:
        if args.examples:
            raise
        sys.stderr.write(f"uni-moe: there are no examples from '{usual}': {sentence_of(error)}\n")
    serve(served, examples, args.host, args.port, args.share)
