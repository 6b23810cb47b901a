"""
What the feature cache saves in the three stages of `examples/real_parts`, step by step, from media and from a warm
cache in turn; with speech in whole windows of 30 s, and cut to its length.

    python benchmarks/real_parts_cache.py ROOT --llm ... --vision_tower ... --speech_tower ... --audio_tower ... \
        [--steps 8] [--rounds 2] [--speech whole cut] [--stages stage1 stage2/speech] \
        [--output benchmarks/results/real_parts_cache.md]

ROOT holds data/, as `examples/real_parts/make_data.py` leaves it. Shown are seconds a step, without what a script does
before its first, and the quotient of the two; "all" weighs the stages by the steps that they have in `run.py`.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from comparing import publish

from uni_moe_hf import UniMoESFTTrainer


sys.path.append(str(Path(__file__).parents[1] / "examples/real_parts"))
import run


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Seconds of each training that runs meanwhile."""
    seconds, train = [], UniMoESFTTrainer.train

    def clocked_train(self, *given, **named):
        done = train(self, *given, **named)
        seconds.append(done.metrics["train_runtime"])
        return done

    UniMoESFTTrainer.train = clocked_train
    try:
        yield seconds
    finally:
        UniMoESFTTrainer.train = train


def measured(args: argparse.Namespace, root: Path, cut: bool) -> dict[str, dict[str, list[float]]]:
    """Stage -> "media" and "cache" -> seconds a step, round by round."""
    parts = {part: getattr(args, part) for part in run.PARTS}
    stages = {
        "stage1": partial(run.stage1, root, cut_speech_windows=cut, **parts),
        **{f"stage2/{name}": partial(run.stage2, root, expert=name) for name in run.EXPERTS},
        "stage3": partial(run.stage3, root),
    }
    stages = {name: stage for name, stage in stages.items() if name in args.stages}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in stages}
    cache = {"feature_cache": root / "features"}
    for name, stage in stages.items():
        # The same seed, and so the same rows; and those that a worker reads ahead.
        stage(args.steps + 4, **cache, fill_feature_cache=True)
        for number in range(args.rounds):
            for kind in ("media", "cache") if number % 2 else ("cache", "media"):
                with clocked() as seconds:
                    stage(args.steps, **(cache if kind == "cache" else {}))
                found[name][kind].append(seconds[0] / args.steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path)
    for part in run.PARTS:
        parser.add_argument(f"--{part}", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--speech", nargs="+", choices=["whole", "cut"], default=["whole", "cut"])
    parser.add_argument("--stages", nargs="+", choices=list(run.STAGES), default=list(run.STAGES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    run.SMALL += ["--logging_strategy", "no", "--disable_tqdm", "true"]
    lines = [
        f"The stages of examples/real_parts from media and from a warm cache, {date.today()}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; {args.steps} steps of 16 rows, "
        f"{args.rounds} rounds.",
        "",
        "| speech | stage | s a step from media | from the cache | quotient |",
        "|---|---|--:|--:|--:|",
    ]
    for speech in args.speech:
        with tempfile.TemporaryDirectory(dir=args.root) as folder:
            root = Path(folder)
            (root / "data").symlink_to((args.root / "data").resolve())
            found = measured(args, root, cut=speech == "cut")
        planned = {name: steps for name, (_, steps) in run.STAGES.items() if name in args.stages}
        for kind in ("media", "cache"):
            rounds = zip(*(found[name][kind] for name in planned), strict=True)
            sums = [sum(s * n for s, n in zip(each, planned.values(), strict=True)) for each in rounds]
            found.setdefault("all", {})[kind] = [total / sum(planned.values()) for total in sums]
        for name, each in found.items():
            quotients = [warm / media for warm, media in zip(each["cache"], each["media"], strict=True)]
            told = " and ".join(f"{value:.2f}" for value in quotients)
            medians = (statistics.median(each[kind]) for kind in ("media", "cache"))
            lines.append(
                f"| {speech} | {run.STAGES.get(name, ['all'])[0]} | "
                f"{' | '.join(f'{median:.2f}' for median in medians)} | {told} |"
            )
        if args.output:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
