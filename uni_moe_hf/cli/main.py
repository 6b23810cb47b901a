"""
`uni-moe`: from your files to a model; ask it, score it, look inside it; convert published checkpoints.

Nothing heavy is imported before a command has work to do, so `--help` and wrong usage answer at once. Exit codes: 0
done, 1 failed with one sentence on stderr (of `data check`: bad rows were listed), 2 wrong usage, 130 interrupted.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from . import (
    beats,
    card,
    convert,
    data,
    doctor,
    evaluate,
    generate,
    info,
    inspection,
    merge_modalities,
    report,
    train,
    web,
)
from .common import set_loudness


# In the order of `uni-moe --help`. Each has `add_command(commands)`, which says what to run.
COMMANDS = (
    data,
    train,
    generate,
    web,
    evaluate,
    info,
    doctor,
    report,
    inspection,
    card,
    convert,
    merge_modalities,
    beats,
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: the exit code.
    """
    parser = command_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(2)
    args = parser.parse_args(argv)
    set_loudness(args.loudness)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)  # of no use to whom asked a question
    warnings.filterwarnings("ignore", module=r"(torchao|bitsandbytes)\b")
    if args.loudness < 1:  # about calls among the libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("UNI_MOE_DEBUG"):
            raise
        from ..hub.files_uni_moe import sentence_of

        text = sentence_of(error)
        if not _is_expected(error):
            text = f"{type(error).__name__}: {text} (UNI_MOE_DEBUG=1 shows where it comes from)"
        sys.stderr.write(f"uni-moe: {text}\n")
        return 1


def command_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = argparse.ArgumentParser(prog="uni-moe", description=__doc__.strip().splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser


def _is_expected(error: Exception) -> bool:
    """What says in its own words what a user, a file or a missing library causes."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ValueError | OSError | ImportError) or bool(
        names & {"StrictDataclassError", "SafetensorError", "OutOfMemoryError"}
    )


__all__ = ["command_parser", "main"]
