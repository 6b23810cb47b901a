"""`uni-moe connectors`: connectors' outputs beside the text embeddings."""

import argparse
from typing import Any

from .common import add_inspection, batches, check_conversation, load_checkpoint, print_report


def add_command(commands: Any) -> None:
    """Options of `uni-moe connectors`."""
    text = "Compare connectors' outputs with the text embeddings beside them."
    add_inspection(commands, "connectors", text, run)


def run(args: argparse.Namespace) -> None:
    """Prints the report."""
    check_conversation(args, takes_rows=True)
    from ..insight.connectors import connector_statistics

    model, processor = load_checkpoint(args)
    for inputs in batches(args, args.limit, model, processor):  # one batch: norms of a few rows do not say much
        print_report(connector_statistics(model, inputs), args)
