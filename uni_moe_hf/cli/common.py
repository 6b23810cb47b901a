"""What several commands share: options of a conversation, loading a checkpoint, printing a report."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..hub.configuration_uni_moe import UniMoEConfig

MEDIA = ("image", "video", "speech", "audio")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# What `--quiet` (-1) and `--verbose` (1) of the command at hand say.
_loudness = 0


class _Part(argparse.Action):
    """Collects `--image a --text b --image c` in the order in which they stand."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        key = "text" if self.dest == "text" else "path"
        namespace.parts = [*(namespace.parts or []), {"type": self.dest, key: values}]


def new_command(
    commands: Any, name: str, text: str, run: Callable, takes_checkpoint: bool = False
) -> argparse.ArgumentParser:
    """A command's parser, with what all commands take."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    if takes_checkpoint:
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub id")
    louder = parser.add_mutually_exclusive_group()
    louder.add_argument(
        "--quiet", action="store_const", const=-1, default=0, dest="loudness", help="no progress bars, no warnings"
    )
    louder.add_argument(
        "--verbose",
        action="store_const",
        const=1,
        default=0,
        dest="loudness",
        help="also show the libraries' log messages",
    )
    return parser


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


def set_loudness(loudness: int) -> None:
    """-1 for `--quiet`, 1 for `--verbose`, else 0: what [`register`] and [`speak_up`] go by."""
    global _loudness
    _loudness = loudness


def register() -> None:
    """Makes the model known to the Auto classes; while it is loaded, only errors are said."""
    from transformers.utils import logging

    from .. import register

    register()
    logging.set_verbosity_info() if _loudness > 0 else logging.set_verbosity_error()
    logging.disable_progress_bar() if _loudness < 0 or not sys.stderr.isatty() else logging.enable_progress_bar()


def speak_up() -> None:
    """What is said from here on is about the user's data."""
    from transformers.utils import logging

    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    logging.set_verbosity(levels[_loudness])


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


def device_of(args: argparse.Namespace) -> str:
    """
    What `--device` means here.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device '{device}' here; leave out --device, or use cpu.") from error
    return device


def load_checkpoint(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model, on its device, and processor."""
    config = load_config(args.checkpoint)
    from transformers import AutoModel, AutoProcessor

    from ..mixtures.loading import load_whole, loaded

    device = device_of(args)
    processor = loaded(AutoProcessor.from_pretrained, args.checkpoint)
    if [*processor.modalities] != [*config.modalities]:
        raise ValueError(
            f"'{args.checkpoint}': the processor is for {list(processor.modalities)}, the model for "
            f"{list(config.modalities)}; do the two belong together?"
        )
    model = load_whole(AutoModel, args.checkpoint, dtype=args.dtype).eval().to(device)
    speak_up()
    return model, processor


def encoded(processor: Any, chat: list[dict]) -> Any:
    """Model inputs of a conversation that waits for an answer."""
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


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
