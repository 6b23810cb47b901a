"""
`uni-moe`: ask a checkpoint, describe it, look inside it, make one from the original's files.

Nothing heavy is imported before a command has work to do, so `--help` and wrong usage answer at once. Exit codes: 0
done, 1 failed with one sentence on stderr (of `data check`: bad rows were listed), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_uni_moe import UniMoEConfig

MEDIA = ("image", "video", "speech", "audio")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: the exit code.
    """
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        _check_files(args)
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") and error.__cause__ else error
        sys.stderr.write(f"uni-moe: {' '.join(str(cause).split())}\n")
        return 1


def _is_expected(error: Exception) -> bool:
    """What users, files and missing libraries cause; anything else is ours, and shows where it comes from."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ValueError | OSError | ImportError) or bool(
        names & {"StrictDataclassError", "SafetensorError", "OutOfMemoryError"}
    )


class _Part(argparse.Action):
    """Collects `--image a --text b --image c` in the order in which they stand."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        key = "text" if self.dest == "text" else "path"
        namespace.parts = [*(namespace.parts or []), {"type": self.dest, key: values}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uni-moe", description=__doc__.strip().splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, reads_checkpoint: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if reads_checkpoint:
            sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub id")
        sub.set_defaults(run=run, parts=None, data=None)
        return sub

    def add_conversation(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--text", action=_Part, metavar="TEXT", help="what to say or ask")
        for kind in MEDIA:
            name = {"audio": "sound", "image": "picture"}.get(kind, kind)
            sub.add_argument(f"--{kind}", action=_Part, metavar="FILE", help=f"a {name}, file or URL; may be repeated")
        sub.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
        sub.add_argument("--dtype", default="auto", choices=["auto", *BYTES], help="default: as saved")

    sub = command("generate", _generate, "Answer a question about any mix of media, in the order given.")
    add_conversation(sub)
    sub.add_argument("--system", metavar="TEXT", help="in place of the default system message")
    sub.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: 256")
    sub.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0, the likeliest words"
    )
    sub.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    sub.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")

    sub = command("info", _info, "Describe a checkpoint without loading its weights.")
    sub.add_argument("--json", action="store_true", help="print JSON")

    for name, run, text in (
        ("routing", _routing, "Count which experts the tokens of each modality are sent to."),
        ("connectors", _connectors, "Compare connectors' outputs with the text embeddings beside them."),
    ):
        sub = command(name, run, text)
        add_conversation(sub)
        sub.add_argument("--data", metavar="FILE", help="rows of conversations (.json, .jsonl) in place of one")
        sub.add_argument(
            "--limit", type=_positive, default=64, metavar="N", help="rows to read, spread over the file (default: 64)"
        )
        if run is _routing:  # connectors are looked at in one batch: norms of a few rows do not say much
            sub.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: 8")
        sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("convert", _convert, "Convert a checkpoint of the original code into one folder.", False)
    sub.add_argument("--base", metavar="DIR", help="the base model (Uni-MoE-*-base): weights, config, tokenizer")
    sub.add_argument("--finetuned", metavar="DIR", help="stage 3 (Uni-MoE-*-e2, -v1.5); without it the base alone")
    sub.add_argument("--vision-tower", metavar="DIR", help="the CLIP it was trained with")
    ears = sub.add_mutually_exclusive_group()
    ears.add_argument("--speech-tower", metavar="DIR", help="the Whisper it was trained with")
    ears.add_argument("--audio-tower", metavar="FILE", help="the BEATs it was trained with (BEATs_*.pt)")
    sub.add_argument("--experts", metavar="DIR", help="of the 8-expert set: its mlp_*.bin")
    sub.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    sub.add_argument(
        "--lora",
        choices=["merge", "keep"],
        default="merge",
        help="add LoRA to the weights, or keep it in the experts and in OUTPUT/adapter (default: merge)",
    )
    sub.add_argument(
        "--router-lora",
        choices=["drop", "merge"],
        default="drop",
        help="what some routers have by accident: lost as in the original's loader, or added (default: drop)",
    )
    sub.add_argument("--dtype", choices=list(BYTES), help="default: that of the base")
    sub.add_argument("--tokenizer", metavar="DIR", help="default: that of the base")
    sub.add_argument("--expert-names", nargs="+", metavar="NAME", help="one for each expert")
    sub.add_argument("--reverse", metavar="DIR", help="back to the original's layout, of a model converted with keep")

    data = commands.add_parser("data", help="Look at training data.", description="Look at training data.")
    sub = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="List the rows that training could not use.", description="List the rows training could not use."
    )
    sub.set_defaults(run=_check_data, parts=None, data=None)
    sub.add_argument("file", metavar="FILE", help="rows as .json, .jsonl or .parquet; media relative to it")
    sub.add_argument("--model", metavar="CHECKPOINT", help="whose towers they are for (default: all kinds of media)")
    sub.add_argument("--voice", choices=["speech", "audio"], default="speech", help="what `voice` files are")
    sub.add_argument("--no-decode", action="store_true", help="look for media files without opening them")

    sub = command("merge-modalities", _merge_modalities, "Join a model for sound and one for speech.", False)
    sub.add_argument("--audio-model", metavar="DIR", required=True, help="a converted model with BEATs")
    sub.add_argument("--speech-model", metavar="DIR", required=True, help="a converted model with Whisper")
    sub.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    sub.add_argument(
        "--experts", nargs="+", metavar="EAR:NAME", help="such as audio:0 speech:2, in order (default: all of both)"
    )
    sub.add_argument(
        "--prefer", choices=["audio", "speech"], help="whose vision connector and adapter to take where they differ"
    )
    sub.add_argument("--experts-per-token", type=_positive, metavar="N", help="default: that of the audio model")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or above")
    return number


def _check_files(args: argparse.Namespace) -> None:
    """Before a model is loaded in vain."""
    for part in args.parts or []:
        path = part.get("path")
        if path is not None and not path.startswith(("http://", "https://", "data:")) and not Path(path).is_file():
            raise ValueError(f"There is no file '{path}' for --{part['type']}; check the path.")
    if args.parts and args.data:
        raise ValueError("Both a conversation and --data were given; give one of the two.")
    if args.run in (_generate, _routing, _connectors) and not args.parts and not args.data:
        options = ["text", *MEDIA] + ["data"] * (args.run is not _generate)
        raise ValueError(f"There is nothing to look at; give one or more of --{', --'.join(options)}.")


def _register() -> None:
    from transformers import logging

    from . import register

    register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _config(checkpoint: str) -> "UniMoEConfig":
    from transformers import AutoConfig

    _register()
    if not Path(checkpoint).exists() and (checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~"))):
        raise ValueError(f"There is no checkpoint '{checkpoint}'; give a folder or a Hub id.")
    if (Path(checkpoint) / "adapter_config.json").is_file():
        raise ValueError(f"'{checkpoint}' holds an adapter, not a model; merge it into its base, or name that.")
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != "uni_moe":
        raise ValueError(f"'{checkpoint}' is a model of type '{config.model_type}', not 'uni_moe'.")
    return config


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model, on its device, and processor."""
    _config(args.checkpoint)
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device '{device}' here; leave out --device, or use cpu.") from error
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModel.from_pretrained(args.checkpoint, dtype=args.dtype).eval().to(device)
    logging.set_verbosity_warning()  # what is said from here on is about the user's data
    return model, processor


def _generate(args: argparse.Namespace) -> None:
    from transformers import TextStreamer, set_seed

    model, processor = _load(args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    inputs = _encoded(processor, [*system, {"role": "user", "content": args.parts}])
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


def _encoded(processor: Any, chat: list[dict]) -> Any:
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _batches(args: argparse.Namespace, batch_size: int, model: Any, processor: Any) -> Iterator[Any]:
    """Model inputs: the conversation, or batches of the rows of `--data`."""
    if args.parts:
        yield _encoded(processor, [{"role": "user", "content": args.parts}]).to(model.device, model.dtype)
        return
    from transformers import BatchFeature

    from .data import UniMoEDataCollator
    from .row_files import load_rows

    rows = load_rows(args.data)
    rows = rows.select(range(0, len(rows), -(-len(rows) // args.limit)))  # spread over the file, which may be sorted
    collate = UniMoEDataCollator(processor, media_root=Path(args.data).parent)
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        yield BatchFeature({name: batch[name] for name in batch if name != "labels"}).to(model.device, model.dtype)


def _routing(args: argparse.Namespace) -> None:
    import torch

    from .routing import record_routing

    model, processor = _load(args)
    with record_routing(model) as routing, torch.no_grad():
        for inputs in _batches(args, args.batch_size, model, processor):
            model(**inputs, logits_to_keep=1)
    _print_report(routing.report(), args)


def _connectors(args: argparse.Namespace) -> None:
    from .routing import connector_statistics

    model, processor = _load(args)
    for inputs in _batches(args, args.limit, model, processor):
        _print_report(connector_statistics(model, inputs), args)


def _print_report(report: Any, args: argparse.Namespace) -> None:
    sys.stdout.write((json.dumps(report.to_dict(), indent=2) if args.json else str(report)) + "\n")


def _info(args: argparse.Namespace) -> None:
    facts = describe(args.checkpoint)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    lines = [f"{args.checkpoint}: {facts['description']}", ""]
    lines += [f"{part:<28}{count:>18,}" for part, count in facts["parameters"]["parts"].items()]
    lines += [f"{'total':<28}{facts['parameters']['total']:>18,}"]
    lines += [f"{'active per word of text':<28}{facts['parameters']['active']:>18,}", ""]
    lines += [f"{f'memory in {dtype}':<28}{size:>15.3f} GB" for dtype, size in facts["memory_gb"].items()]
    lines += ["", *(f"{name:<28}{facts[name]}" for name in ("takes", "experts", "stage", "dtype", "licence"))]
    sys.stdout.write("\n".join(lines) + "\n")


def _check_data(args: argparse.Namespace) -> int:
    """Exit code 1 where a row is bad."""
    from .data import MODALITIES, check_rows

    modalities = _config(args.model).modalities if args.model else MODALITIES
    count = 0
    for number, reason in check_rows(args.file, modalities, args.voice, not args.no_decode):
        sys.stdout.write(f"row {number}: {reason}\n")
        count += 1
    sys.stdout.write(f"{args.file}: {f'{count} rows cannot be used' if count else 'every row can be used'}\n")
    return int(count > 0)


def _convert(args: argparse.Namespace) -> None:
    _clean_up_when_terminated()
    if args.reverse:
        names = ("base", "finetuned", "vision_tower", "speech_tower", "audio_tower", "experts", "dtype", "tokenizer")
        if given := [name for name in (*names, "expert_names") if getattr(args, name)]:
            raise ValueError(f"--reverse takes a folder and --output alone; leave out --{given[0].replace('_', '-')}.")
        from .conversion import revert_checkpoint

        revert_checkpoint(args.reverse, args.output, progress=True)
        sys.stdout.write(f"{args.output}: in the original's layout\n")
        return
    for name in ("base", "vision_tower"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; `uni-moe convert --help` shows what is needed.")
    _register()
    from .conversion import convert_checkpoint

    names = (
        "base finetuned vision_tower speech_tower audio_tower experts lora router_lora dtype tokenizer expert_names"
    )
    done = convert_checkpoint(
        output=args.output,
        command=_command_line(args),
        progress=True,
        **{name: getattr(args, name) for name in names.split()},
    )
    lines = [f"{done.output}: {describe(str(done.output))['description']}, {done.num_tensors} tensors"]
    lines += [f"left out: {', '.join(f'{count} of {role}' for role, count in done.dropped.items())}"]
    sys.stdout.write("\n".join([*lines, *([done.processor] if done.processor else [])]) + "\n")


def _merge_modalities(args: argparse.Namespace) -> None:
    _clean_up_when_terminated()
    _register()
    from .merging import merge_modalities

    merge_modalities(
        args.audio_model,
        args.speech_model,
        args.output,
        experts=args.experts,
        prefer=args.prefer,
        num_experts_per_tok=args.experts_per_token,
        command=_command_line(args),
        progress=True,
    )
    sys.stdout.write(f"{args.output}: {describe(args.output)['description']}\n")
    if not (Path(args.output) / "processor_config.json").is_file():
        sys.stdout.write("One of the two has no processor, so there is none.\n")


def _clean_up_when_terminated() -> None:
    """`kill` or a closed terminal end the command as Ctrl-C does, once: what is half-written goes away."""
    import signal

    def interrupt(*_: Any) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    for name in names:
        signal.signal(name, interrupt)


def _command_line(args: argparse.Namespace) -> str:
    """As it was typed."""
    import shlex

    return shlex.join(["uni-moe", *args.argv])


def describe(checkpoint: str) -> dict[str, Any]:
    """
    What `uni-moe info` tells.

    Args:
        checkpoint (`str`): A folder or a Hub id.

    Returns:
        `dict` of plain values: `description`, `takes`, `experts`, `stage`, `dtype`, `licence`; `parameters` (`parts`,
        `total`, and `active`: what one word of text meets, with K of E experts and no tower); `memory_gb` of the
        weights in each dtype, in 10^9 bytes.

    Raises:
        ValueError: there is no such checkpoint, or it is of another kind.
    """
    config = _config(checkpoint)
    import torch

    from .modeling_uni_moe import UniMoEForConditionalGeneration
    from .stages import part_of

    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    text, parts, active = config.text_config, {}, 0.0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
        if "_tower." not in name and "_connector." not in name:
            is_stack = ".mlp.experts." in name and ".base." not in name
            active += parameter.numel() * (text.num_experts_per_tok / text.num_experts if is_stack else 1)
    total, sparse = sum(parts.values()), text.mlp_layer_types.count("sparse")
    experts = "none (every layer is dense)"
    if sparse:
        names = ", ".join(text.expert_names or map(str, range(text.num_experts)))
        base = "one shared base" if text.shared_expert_base else "own bases"
        lora = f"LoRA of rank {text.expert_lora_rank}" if text.expert_lora_rank else "no LoRA"
        experts = f"{text.num_experts} ({names}), {text.num_experts_per_tok} per token; {base}, {lora}"
    return {
        "description": f"Uni-MoE, {total / 1e6:,.1f} M parameters, {sparse} of {text.num_hidden_layers} layers sparse",
        "takes": ", ".join(("text", *config.modalities)),
        "experts": experts,
        "stage": config.stage or ("mixture of experts" if sparse else "before the mixture: dense"),
        "dtype": str(config.dtype or "not stated").removeprefix("torch."),
        "licence": _licence(checkpoint),
        "parameters": {"parts": parts, "total": total, "active": round(active)},
        "memory_gb": {dtype: total * size / 1e9 for dtype, size in BYTES.items()},
    }


def _licence(checkpoint: str) -> str:
    """As the model card in the folder states it."""
    card = Path(checkpoint) / "README.md"
    if card.is_file():
        from huggingface_hub import ModelCard

        if licence := ModelCard.load(card).data.get("license"):
            return str(licence)
    return "not stated; weights inherit the licences of their parts"


__all__ = ["describe", "main"]


if __name__ == "__main__":
    sys.exit(main())
