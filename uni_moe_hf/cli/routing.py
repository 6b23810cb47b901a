"""`uni-moe routing`: which experts the tokens of each modality are sent to."""

import argparse
from typing import Any

from .common import add_inspection, batches, check_conversation, load_checkpoint, positive, print_report


def add_command(commands: Any) -> None:
    """Options of `uni-moe routing`."""
    parser = add_inspection(commands, "routing", "Count which experts the tokens of each modality are sent to.", run)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")


def run(args: argparse.Namespace) -> None:
    """Prints the report."""
    check_conversation(args, takes_rows=True)
    import torch

    from ..mixtures.routing import record_routing

    model, processor = load_checkpoint(args)
    with record_routing(model) as routing, torch.no_grad():
        for inputs in batches(args, args.batch_size, model, processor):
            model(**inputs, logits_to_keep=1)
    print_report(routing.report(), args)
