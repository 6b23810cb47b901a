"""`uni-moe convert`: a checkpoint of the original code into one folder, and back."""

import argparse
import sys
from typing import Any

from .common import BYTES, clean_up_when_terminated, command_line, new_command, register
from .info import describe


def add_command(commands: Any) -> None:
    """Options of `uni-moe convert`."""
    parser = new_command(commands, "convert", "Convert a checkpoint of the original code into one folder.", run)
    parser.add_argument("--base", metavar="DIR", help="the base model (Uni-MoE-*-base): weights, config, tokenizer")
    parser.add_argument("--finetuned", metavar="DIR", help="stage 3 (Uni-MoE-*-e2, -v1.5); without it the base alone")
    parser.add_argument("--vision-tower", metavar="DIR", help="the CLIP it was trained with")
    ears = parser.add_mutually_exclusive_group()
    ears.add_argument("--speech-tower", metavar="DIR", help="the Whisper it was trained with")
    ears.add_argument("--audio-tower", metavar="FILE", help="the BEATs it was trained with (BEATs_*.pt)")
    parser.add_argument("--experts", metavar="DIR", help="of the 8-expert set: its mlp_*.bin")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--lora",
        choices=["merge", "keep"],
        default="merge",
        help="add LoRA to the weights, or keep it in the experts and in OUTPUT/adapter (default: merge)",
    )
    parser.add_argument(
        "--router-lora",
        choices=["drop", "merge"],
        default="drop",
        help="what some routers have by accident: lost as in the original's loader, or added (default: drop)",
    )
    parser.add_argument("--dtype", choices=list(BYTES), help="default: that of the base")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: that of the base")
    parser.add_argument("--expert-names", nargs="+", metavar="NAME", help="one for each expert")
    parser.add_argument(
        "--reverse", metavar="DIR", help="back to the original's layout, of a model converted with keep"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and says what it holds."""
    clean_up_when_terminated()
    if args.reverse:
        names = ("base", "finetuned", "vision_tower", "speech_tower", "audio_tower", "experts", "dtype", "tokenizer")
        if given := [name for name in (*names, "expert_names") if getattr(args, name)]:
            raise ValueError(f"--reverse takes a folder and --output alone; leave out --{given[0].replace('_', '-')}.")
        from ..original.conversion import revert_checkpoint

        revert_checkpoint(args.reverse, args.output, progress=True)
        sys.stdout.write(f"{args.output}: in the original's layout\n")
        return
    for name in ("base", "vision_tower"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; `uni-moe convert --help` shows what is needed.")
    register()
    from ..original.conversion import convert_checkpoint

    names = (
        "base finetuned vision_tower speech_tower audio_tower experts lora router_lora dtype tokenizer expert_names"
    )
    done = convert_checkpoint(
        output=args.output,
        command=command_line(args),
        progress=True,
        **{name: getattr(args, name) for name in names.split()},
    )
    lines = [f"{done.output}: {describe(str(done.output))['description']}, {done.num_tensors} tensors"]
    lines += [f"left out: {', '.join(f'{count} of {role}' for role, count in done.dropped.items())}"]
    sys.stdout.write("\n".join([*lines, *([done.processor] if done.processor else [])]) + "\n")
