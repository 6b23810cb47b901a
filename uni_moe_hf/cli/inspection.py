"""`uni-moe routing` and `uni-moe connectors`: what a conversation, or some rows, do inside a checkpoint."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from .common import (
    add_conversation,
    check_conversation,
    encoded,
    load_checkpoint,
    new_command,
    positive,
    print_report,
)


def add_command(commands: Any) -> None:
    """Options of `uni-moe routing` and `uni-moe connectors`."""
    text = "Count which experts the tokens of each modality are sent to."
    parser = _add(commands, "routing", text, routing)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    _add(commands, "connectors", "Compare connectors' outputs with the text embeddings beside them.", connectors)


def _add(commands: Any, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    parser = new_command(commands, name, text, run, takes_checkpoint=True)
    add_conversation(parser)
    parser.add_argument("--data", metavar="FILE", help="rows, as training takes them, in place of a conversation")
    parser.add_argument(
        "--limit", type=positive, default=64, metavar="N", help="rows to read, spread over the file (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def routing(args: argparse.Namespace) -> None:
    """Prints loads of the experts."""
    check_conversation(args, takes_rows=True)
    import torch

    from ..mixtures.routing import record_routing

    model, processor = load_checkpoint(args)
    with record_routing(model) as recorded, torch.no_grad():
        for inputs in _batches(args, args.batch_size, model, processor):
            model(**inputs, logits_to_keep=1)
    print_report(recorded.report(), args)


def connectors(args: argparse.Namespace) -> None:
    """Prints norms of what connectors give."""
    check_conversation(args, takes_rows=True)
    from ..insight.connectors import connector_statistics

    model, processor = load_checkpoint(args)
    for inputs in _batches(args, args.limit, model, processor):  # one batch: norms of a few rows do not say much
        print_report(connector_statistics(model, inputs), args)


def _batches(args: argparse.Namespace, batch_size: int, model: Any, processor: Any) -> Iterator[Any]:
    """Model inputs: the conversation, or batches of the rows of `--data`."""
    if args.parts:
        yield encoded(processor, [{"role": "user", "content": args.parts}]).to(model.device, model.dtype)
        return
    from transformers import BatchFeature

    from ..mixtures.progress import progress_bar
    from ..training.data import UniMoEDataCollator
    from ..training.row_files import load_rows, spread_over

    rows = load_rows(args.data)
    rows = rows.select(spread_over(len(rows), args.limit))
    collate = UniMoEDataCollator(processor)
    for start in progress_bar(range(0, len(rows), batch_size), desc="rows", unit="batch"):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        yield BatchFeature({name: batch[name] for name in batch if name != "labels"}).to(model.device, model.dtype)
