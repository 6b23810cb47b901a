"""
The paper's claims in miniature: `make study`.

    python examples/study/run.py outputs/study

Makes the demo's parts and a harder version of its world, trains every arm of `claims.py` with several seeds, and
writes the page with its figures. A run that is stopped goes on where it was; `--quick` takes a few minutes and shows
that everything runs, not how the claims fare.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from filelock import FileLock


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

import make_data  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from claims import CLAIMS, IN_DEPTH  # noqa: E402
from page import write_page  # noqa: E402
from recipe import HARD, Recipe, World, run  # noqa: E402

from uni_moe_hf.mixtures.progress import progress_bar  # noqa: E402


SEEDS = 5
QUICK = make_data.Sizes(
    train_files={"image": 60, "video": 40, "audio": 40, "speech": 40},
    question_files=40,
    mixed_rows=dict.fromkeys(HARD.mixed_rows, 40),
    single_rows=30,
    test_questions=8,
)
QUICK_PARTS = {"vision_tower": {"steps": 5, "pictures": 200}, "speech_tower": {"steps": 3, "recordings": 60}}
QUICK_PARTS |= {"audio_tower": {"steps": 3, "recordings": 60}, "llm": {"steps": 5}}


def prepare() -> None:
    """Of a process that trains: one thread, as models are tiny, and no chatter."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("uni_moe_hf").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    sys.stdout = open(os.devnull, "w")


def pretrain(folder: Path, name: str, settings: dict) -> None:
    torch.manual_seed(0)
    parts.PARTS[name](folder, **settings)


def train(root: Path, scale: float, recipe: Recipe, seed: int, in_depth: bool) -> None:
    """One arm with one seed; its line is written at once: who stops the study loses what is under way alone."""
    found = run(World(root, scale), recipe, seed, in_depth)
    with FileLock(root / ".results.lock"), (root / "results.jsonl").open("a") as out:
        out.write(json.dumps({"digest": recipe.digest(), "seed": seed, **found}) + "\n")


def make_world(root: Path, quick: bool, pool: ProcessPoolExecutor) -> None:
    """Parts and data, once."""
    wanted = [name for name in parts.PARTS if not (root / "parts" / name / "config.json").is_file()]
    jobs = [pool.submit(pretrain, root / "parts" / name, name, QUICK_PARTS[name] if quick else {}) for name in wanted]
    for job in jobs:
        job.result()
    if not (root / "data/test.jsonl").is_file():
        make_data.main(str(root / "data"), 0, QUICK if quick else HARD)
    for name in ("stage1", *(f"stage2_{expert}" for expert in make_data.EXPERTS), "stage3", "test"):
        World(root).encode(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--quick", action="store_true", help="few rows, steps and seeds: shows that it runs")
    parser.add_argument("--seeds", type=int, help=f"how many (default: {SEEDS}; quick: 2)")
    parser.add_argument("--claims", nargs="+", metavar="LETTER", help="only these (default: all; quick: a)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--page", type=Path, help="where the page goes (default: ROOT/study.md)")
    args = parser.parse_args()
    letters = args.claims or (["a"] if args.quick else [claim.letter for claim in CLAIMS])
    if unknown := set(letters) - {claim.letter for claim in CLAIMS}:
        parser.error(f"there are no claims {', '.join(sorted(unknown))}; there are {[c.letter for c in CLAIMS]}")
    claims = [claim for claim in CLAIMS if claim.letter in letters]
    seeds = args.seeds or (2 if args.quick else SEEDS)
    if seeds < 2:
        parser.error("an interval needs two seeds or more")
    args.root.mkdir(parents=True, exist_ok=True)
    file = args.root / "results.jsonl"
    scale = 0.05 if args.quick else 1.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=prepare) as pool:
        make_world(args.root, args.quick, pool)
        done = {(each["digest"], each["seed"]) for each in map(json.loads, lines_of(file))}
        jobs = []
        for claim in claims:
            for seed in range(seeds):
                for recipe in claim.arms.values():
                    key = (recipe.digest(), seed)
                    if key not in done:
                        done.add(key)
                        jobs.append(pool.submit(train, args.root, scale, recipe, seed, recipe in IN_DEPTH))
        begin = time.time()
        finished = progress_bar(as_completed(jobs), total=len(jobs), desc="study", unit="run")
        for count, job in enumerate(finished, start=1):
            if job.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            job.result()
            if not sys.stderr.isatty():  # where there is no bar
                spent = (time.time() - begin) / 60
                left = spent / count * (len(jobs) - count)
                print(f"{count} of {len(jobs)} runs, {spent:.0f} min, some {left:.0f} min left", flush=True)
            if count % 25 == 0:
                write_page(args.page or args.root / "study.md", claims, seeds, lines_of(file))
    write_page(args.page or args.root / "study.md", claims, seeds, lines_of(file))
    print(f"The page is {args.page or args.root / 'study.md'}.")


def lines_of(file: Path) -> list[str]:
    """Results so far; a line that a killed run did not finish is none."""
    if not file.is_file():
        return []
    return [line for line in file.read_text().splitlines() if line.endswith("}")]


if __name__ == "__main__":
    main()
