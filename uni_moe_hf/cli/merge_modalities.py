"""`uni-moe merge-modalities`: one model with both ears out of two converted ones."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import clean_up_when_terminated, command_line, new_command, positive, register
from .info import describe


def add_command(commands: Any) -> None:
    """Options of `uni-moe merge-modalities`."""
    parser = new_command(commands, "merge-modalities", "Join a model for sound and one for speech.", run)
    parser.add_argument("--audio-model", metavar="DIR", required=True, help="a converted model with BEATs")
    parser.add_argument("--speech-model", metavar="DIR", required=True, help="a converted model with Whisper")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--experts", nargs="+", metavar="EAR:NAME", help="such as audio:0 speech:2, in order (default: all of both)"
    )
    parser.add_argument(
        "--prefer", choices=["audio", "speech"], help="whose vision connector and adapter to take where they differ"
    )
    parser.add_argument("--experts-per-token", type=positive, metavar="N", help="default: that of the audio model")


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and says what it holds."""
    clean_up_when_terminated()
    register()
    from ..original.merging import merge_modalities

    merge_modalities(
        args.audio_model,
        args.speech_model,
        args.output,
        experts=args.experts,
        prefer=args.prefer,
        num_experts_per_tok=args.experts_per_token,
        command=command_line(args),
        progress=True,
    )
    sys.stdout.write(f"{args.output}: {describe(args.output)['description']}\n")
    if not (Path(args.output) / "processor_config.json").is_file():
        sys.stdout.write("One of the two has no processor, so there is none.\n")
