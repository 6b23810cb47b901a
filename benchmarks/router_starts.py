"""
How good a mixture is before any step of stage 3, by where its routers start.

    python benchmarks/router_starts.py outputs/demo

Takes what `make demo` leaves: the stage-1 model, the experts, rows to set routers on (stage 3's) and held-out rows.
The dense model, each row's own expert, and random, balanced and informed routers answer held-out rows of one medium.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from comparing import publish
from transformers import AutoProcessor, set_seed

from uni_moe_hf import StageArguments, UniMoEDataCollator, UniMoEForConditionalGeneration, grow_experts, start_routers
from uni_moe_hf.evaluation.answering import answer_losses
from uni_moe_hf.mixtures.router_starts import ROUTER_STARTS, sparse_blocks


OWN = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}


def dense_model(root: Path) -> UniMoEForConditionalGeneration:
    return UniMoEForConditionalGeneration.from_pretrained(root / "stage1").eval()


def mixture(root: Path, layers: str) -> UniMoEForConditionalGeneration:
    experts = {"text": None, **{name: root / "stage2" / name / "expert" for name in ("vision", "audio", "speech")}}
    return grow_experts(dense_model(root), experts, layers=layers)


@contextmanager
def only(model: UniMoEForConditionalGeneration, expert: str) -> Iterator[None]:
    """Every token to one expert, with all weight."""
    number = model.config.text_config.expert_names.index(expert)

    def choose(_, __, output):
        logits, weights, chosen = output
        first = torch.arange(chosen.shape[1], device=chosen.device) == 0
        return logits, first.expand_as(weights).to(weights.dtype), torch.full_like(chosen, number)

    hooks = [block.gate.register_forward_hook(choose) for _, block in sparse_blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mean_loss(model: UniMoEForConditionalGeneration, batches: list[dict]) -> float:
    with torch.no_grad():
        return float(np.mean([loss for batch in batches for loss in answer_losses(model, dict(batch))[0]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--layers", default="even", help="sparse layers: even (as the demo) or all")
    parser.add_argument("--seeds", type=int, default=3, help="routers that are tried (default: 3)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(args.root / "stage1")
    collator = UniMoEDataCollator(processor, media_root=args.root / "data")
    held: dict[str, list] = {medium: [] for medium in OWN}
    for line in (args.root / "data/test.jsonl").read_text().splitlines():
        row = json.loads(line)
        held.get(row["task"], []).append({"messages": row["messages"]})
    batches = {m: [collator(rows[at : at + 48]) for at in range(0, len(rows), 48)] for m, rows in held.items()}
    found = {"dense, after stage 1": [{m: mean_loss(dense_model(args.root), batches[m]) for m in OWN}]}
    model = mixture(args.root, args.layers)
    oracle = {}
    for medium, expert in OWN.items():
        with only(model, expert):
            oracle[medium] = mean_loss(model, batches[medium])
    found["each row's own expert"] = [oracle]
    options = StageArguments(dataset_name=str(args.root / "data/stage3.jsonl"))
    seconds = []
    for start in reversed(ROUTER_STARTS):
        for seed in range(args.seeds):
            set_seed(seed)
            model = mixture(args.root, args.layers)
            sample = list(options.sample(options.rows(), model, processor, 64))
            begin = time.time()
            start_routers(model, sample, start)
            seconds += [time.time() - begin] if start == "informed" else []
            found.setdefault(f"{start} routers", []).append({m: mean_loss(model.eval(), batches[m]) for m in OWN})
    lines = ["| before stage 3 | " + " | ".join(OWN) + " |", "|---|" + "--:|" * len(OWN)]
    dense = found["dense, after stage 1"][0]
    for name, runs in found.items():
        cells = []
        for medium in OWN:
            losses = [run[medium] for run in runs]
            gap = dense[medium] - oracle[medium]
            way = f" ({100 * (dense[medium] - np.mean(losses)) / gap:.0f} %)" if gap > 0 else ""
            ends = f", {min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{np.mean(losses):.4f}{way}{ends}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    told = [
        f"Losses of answers to held-out rows before any step of stage 3, by where routers start, {date.today()}: "
        f"`python benchmarks/router_starts.py outputs/demo --layers {args.layers} --seeds {args.seeds}`. In brackets "
        "how far a start is from the dense model to each row's own expert, then the range over "
        f"{args.seeds} random initialisations. Informing took {np.mean(seconds):.0f} s on one core.",
        "",
    ]
    publish([*told, *lines], args.output)


if __name__ == "__main__":
    main()
