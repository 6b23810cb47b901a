"""`uni-moe generate`: an answer to a question about any mix of media."""

import argparse
import sys
from typing import Any

from .common import add_conversation, check_conversation, encoded, load_checkpoint, new_command, positive


def add_command(commands: Any) -> None:
    """Options of `uni-moe generate`."""
    parser = new_command(
        commands,
        "generate",
        "Answer a question about any mix of media, in the order given.",
        run,
        takes_checkpoint=True,
    )
    add_conversation(parser)
    parser.add_argument("--system", metavar="TEXT", help="in place of the default system message")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0, the likeliest words"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or above")
    return number


def run(args: argparse.Namespace) -> None:
    """Streams the answer to stdout."""
    check_conversation(args, takes_rows=False)
    from transformers import TextStreamer, set_seed

    model, processor = load_checkpoint(args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    inputs = encoded(processor, [*system, {"role": "user", "content": args.parts}])
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    if not args.temperature:
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):  # greedy search would warn of them
            setattr(model.generation_config, name, None)
    set_seed(args.seed)
    streamer = (
        None if args.no_stream else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    words = model.generate(
        **inputs.to(model.device, model.dtype), max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling
    )
    if args.no_stream:
        answer = processor.decode(words[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        sys.stdout.write(f"{answer.strip()}\n")
