"""What several commands share: options of a conversation, loading a checkpoint, printing a report."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..hub.configuration_uni_moe import UniMoEConfig

MEDIA = ("image", "video", "speech", "audio")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Part(argparse.Action):
    """Collects `--image a --text b --image c` in the order in which they stand."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        key = "text" if self.dest == "text" else "path"
        namespace.parts = [*(namespace.parts or []), {"type": self.dest, key: values}]


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that a command reads."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub id")


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """Parts of a conversation, in any order, and how the model is loaded for them."""
    parser.set_defaults(parts=None, data=None)
    parser.add_argument("--text", action=_Part, metavar="TEXT", help="what to say or ask")
    for kind in MEDIA:
        name = {"audio": "sound", "image": "picture"}.get(kind, kind)
        parser.add_argument(f"--{kind}", action=_Part, metavar="FILE", help=f"a {name}, file or URL; may be repeated")
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *BYTES], help="default: as saved")


def add_inspection(commands: Any, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    """A command that looks at a checkpoint with a conversation, or with rows of a file."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    add_conversation(parser)
    parser.add_argument("--data", metavar="FILE", help="rows, as training takes them, in place of a conversation")
    parser.add_argument(
        "--limit", type=positive, default=64, metavar="N", help="rows to read, spread over the file (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def positive(text: str) -> int:
    """An option's whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def not_negative(text: str) -> int:
    """An option's whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def check_conversation(args: argparse.Namespace, takes_rows: bool) -> None:
    """
    Before a model is loaded in vain.

    Raises:
        ValueError: a file is missing; a conversation and rows, or neither.
    """
    for part in args.parts or []:
        path = part.get("path")
        if (
            path is not None
            and not path.startswith(("http://", "https://", "data:", "file:"))
            and not Path(path).is_file()
        ):
            raise ValueError(f"There is no file '{path}' for --{part['type']}; check the path.")
    if args.parts and not any((part.get("text") or part.get("path") or "").strip() for part in args.parts):
        raise ValueError("The text is empty; say or ask something.")
    if args.parts and args.data:
        raise ValueError("Both a conversation and --data were given; give one of the two.")
    if not args.parts and not args.data:
        options = ["text", *MEDIA] + ["data"] * takes_rows
        raise ValueError(f"There is nothing to look at; give one or more of --{', --'.join(options)}.")


def register() -> None:
    """Makes the model known to the Auto classes, quietly."""
    from transformers import logging

    from .. import register

    register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_config(checkpoint: str) -> "UniMoEConfig":
    """
    Raises:
        ValueError: there is no such checkpoint, or it is of another kind.
    """
    register()
    from ..mixtures.loading import load_part_config

    config = load_part_config(checkpoint, "CHECKPOINT")
    if config.model_type != "uni_moe":
        raise ValueError(f"'{checkpoint}' is a model of type '{config.model_type}', not 'uni_moe'.")
    return config


def load_checkpoint(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model, on its device, and processor."""
    config = load_config(args.checkpoint)
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    from ..mixtures.loading import load_whole, loaded

    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device '{device}' here; leave out --device, or use cpu.") from error
    processor = loaded(AutoProcessor.from_pretrained, args.checkpoint)
    if [*processor.modalities] != [*config.modalities]:
        raise ValueError(
            f"'{args.checkpoint}': the processor is for {list(processor.modalities)}, the model for "
            f"{list(config.modalities)}; do the two belong together?"
        )
    model = load_whole(AutoModel, args.checkpoint, dtype=args.dtype).eval().to(device)
    logging.set_verbosity_warning()  # what is said from here on is about the user's data
    return model, processor


def encoded(processor: Any, chat: list[dict]) -> Any:
    """Model inputs of a conversation that waits for an answer."""
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def batches(args: argparse.Namespace, batch_size: int, model: Any, processor: Any) -> Iterator[Any]:
    """Model inputs: the conversation, or batches of the rows of `--data`."""
    if args.parts:
        yield encoded(processor, [{"role": "user", "content": args.parts}]).to(model.device, model.dtype)
        return
    from transformers import BatchFeature

    from ..training.data import UniMoEDataCollator
    from ..training.row_files import load_rows, spread_over

    rows = load_rows(args.data)
    rows = rows.select(spread_over(len(rows), args.limit))
    collate = UniMoEDataCollator(processor)
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        yield BatchFeature({name: batch[name] for name in batch if name != "labels"}).to(model.device, model.dtype)


def print_report(report: Any, args: argparse.Namespace) -> None:
    """A report as a table, or as JSON."""
    sys.stdout.write((json.dumps(report.to_dict(), indent=2) if args.json else str(report)) + "\n")


def clean_up_when_terminated() -> None:
    """`kill` or a closed terminal end the command as Ctrl-C does, once: what is half-written goes away."""
    import signal

    def interrupt(*_: Any) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    for name in names:
        signal.signal(name, interrupt)


def command_line(args: argparse.Namespace) -> str:
    """As it was typed."""
    import shlex

    return shlex.join(["uni-moe", *args.argv])
