"""`uni-moe beats`: a folder out of a published BEATs checkpoint."""

import argparse
import sys
from typing import Any

from .common import clean_up_when_terminated, new_command, register


def add_command(commands: Any) -> None:
    """Options of `uni-moe beats`."""
    parser = new_command(commands, "beats", "Make a folder out of a published BEATs checkpoint.", run)
    parser.add_argument("file", metavar="FILE", help="BEATs_iter3*.pt, self-supervised or finetuned")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder, for `audio_tower`")


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and says what it holds."""
    clean_up_when_terminated()
    register()
    from ..mixtures.beats_file import read_beats
    from ..original.checkpoints import check_new, new_folder

    check_new(args.output)
    model = read_beats(args.file)
    with new_folder(args.output) as folder:
        model.save_pretrained(folder)
    size, layers = sum(p.numel() for p in model.parameters()), model.config.num_hidden_layers
    sys.stdout.write(f"{args.output}: BEATs of {layers} layers, {size / 1e6:,.1f} M parameters\n")
