"""`uni-moe info`: what a checkpoint is, without its weights."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import BYTES, load_config, new_command, positive


def add_command(commands: Any) -> None:
    """Options of `uni-moe info`."""
    parser = new_command(
        commands, "info", "Describe a checkpoint without loading its weights.", run, takes_checkpoint=True
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plan", action="store_true", help="estimate peak training memory for each stage")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="of --plan: rows at once (8)")
    parser.add_argument("--tokens", type=positive, default=512, metavar="N", help="of --plan: of a row (512)")


def run(args: argparse.Namespace) -> None:
    """Prints what [`describe`] tells, or the plan."""
    if args.plan:
        print_plan(args)
        return
    facts = describe(args.checkpoint)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    lines = [f"{args.checkpoint}: {facts['description']}", ""]
    lines += [f"{part:<28}{count:>18,}" for part, count in facts["parameters"]["parts"].items()]
    lines += [f"{'total':<28}{facts['parameters']['total']:>18,}"]
    lines += [f"{'active per word of text':<28}{facts['parameters']['active']:>18,}", ""]
    lines += [f"{f'memory in {dtype}':<28}{size:>15.3f} GB" for dtype, size in facts["memory_gb"].items()]
    lines += ["", *(f"{name:<28}{facts[name]}" for name in ("kinds", "takes", "experts", "stage", "dtype", "licence"))]
    sys.stdout.write("\n".join(lines) + "\n")


def print_plan(args: argparse.Namespace) -> None:
    """Peaks of memory by stage and choice."""
    config = load_config(args.checkpoint)
    import torch

    from ..recipes.planning import plan_choices
    from ..training.stages import STAGES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = plan_choices(config, batch_size=args.batch_size, num_tokens=args.tokens, device=device)
    if args.json:
        facts = {
            choice: {stage: {**vars(plan), "total": plan.total} for stage, plan in stages.items()}
            for choice, stages in plans.items()
        }
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    where = "a GPU" if device == "cuda" else "a CPU, libraries included"
    lines = [
        f"Estimated peak in GB, one process on {where}, {args.batch_size} rows of {args.tokens} tokens at once",
        "",
    ]
    lines += [f"{'':<36}" + "".join(f"{stage:>12}" for stage in STAGES)]
    for choice, stages in plans.items():
        cells = (f"{stages[stage].total / 1e9:>12.2f}" if stage in stages else f"{'':>12}" for stage in STAGES)
        lines.append(f"{choice:<36}{''.join(cells)}")
    trained = (f"{plans['bfloat16'][stage].trained_parameters / 1e6:>11,.1f}M" for stage in STAGES)
    lines += ["", f"{'parameters trained':<36}{''.join(trained)}"]
    sys.stdout.write("\n".join(lines) + "\n")


def describe(checkpoint: str) -> dict[str, Any]:
    """
    What `uni-moe info` tells.

    Args:
        checkpoint (`str`): A folder or a Hub id.

    Returns:
        `dict` of plain values: `description`, `kinds` (of decoder and towers), `takes`, `experts`, `stage`, `dtype`,
        `licence`; `parameters` (`parts`, `total`, and `active`: what one word of text meets, with K of E experts and
        no tower); `memory_gb` of the weights in each dtype, in 10^9 bytes.

    Raises:
        ValueError: there is no such checkpoint, or it is of another kind.
    """
    config = load_config(checkpoint)
    from ..mixtures.loading import empty_model
    from ..training.stages import part_of

    model = empty_model(checkpoint, config)
    text, parts, active = config.text_config, {}, 0.0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
        if "_tower." not in name and "_connector." not in name:
            is_stack = ".mlp.experts." in name and ".base." not in name
            active += parameter.numel() * (text.num_experts_per_tok / text.num_experts if is_stack else 1)
    towers = (config.vision_config, config.speech_config, config.audio_config)
    kinds = [part.model_type for part in (text, *towers) if part is not None]
    total, sparse = sum(parts.values()), text.mlp_layer_types.count("sparse")
    experts = "none (every layer is dense)"
    if sparse:
        names = ", ".join(text.expert_names or map(str, range(text.num_experts)))
        base = "one shared base" if text.shared_expert_base else "own bases"
        lora = f"LoRA of rank {text.expert_lora_rank}" if text.expert_lora_rank else "no LoRA"
        experts = f"{text.num_experts} ({names}), {text.num_experts_per_tok} per token; {base}, {lora}"
    return {
        "description": f"Uni-MoE, {total / 1e6:,.1f} M parameters, {sparse} of {text.num_hidden_layers} layers sparse",
        "kinds": ", ".join(kinds),
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
            named = getattr(ModelCard.load(card).data, "license_name", None)
            return f"{licence} ({named})" if named else str(licence)
    return "not stated; weights inherit the licences of their parts"


__all__ = ["describe"]
