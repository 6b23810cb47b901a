"""
The whole recipe in miniature, on real files: `make demo`.

    python examples/demo/run.py outputs/demo

Writes a data set, pretrains stand-ins for the parts that a user would download, runs the three stages with the example
scripts, measures held-out files, saves the model, and asks it in a fresh process. `--control` asks an existing model
the same questions with another row's media instead (`make demo-control`).
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import make_data  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
import train_stage1_connectors  # noqa: E402
import train_stage2_experts  # noqa: E402
import train_stage3_moe  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

from uni_moe_hf import complete_card, routing_report  # noqa: E402
from uni_moe_hf.cli import main as uni_moe  # noqa: E402


CONFIGS = HERE.parent / "configs"
# What a tiny model on a CPU needs instead of the paper's numbers.
TINY = (
    "--use_cpu --bf16 false --gradient_checkpointing false --save_strategy no --report_to none --logging_steps 20 "
    "--per_device_train_batch_size 32 --gradient_accumulation_steps 1 --dataloader_num_workers 1 --seed 0"
).split()
EXPERTS = {"vision": ["image", "video"], "audio": ["audio"], "speech": ["speech"]}


def cached(root: Path) -> list[str]:
    """What towers give for a file is computed once, by whichever stage meets it first."""
    return ["--feature_cache", str(root / "features"), "--fill_feature_cache"]


def pretrain(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    parts.PARTS[name](folder / name)


def stage1(root: Path) -> None:
    args = f"--config {CONFIGS / 'stage1_connectors.yaml'} --dataset_name {root / 'data/stage1.jsonl'}"
    args += f" --output_dir {root / 'stage1'} --learning_rate 2e-3 --num_train_epochs 1.3 --cut_speech_windows"
    args += f" --llm {root / 'parts/llm'} --num_speech_query_tokens 8 --num_audio_query_tokens 8"
    args += f" --chat_template {root / 'parts/llm/chat_template.jinja'}"
    args += "".join(
        f" --{tower} {root / 'parts' / tower}" for tower in ("vision_tower", "speech_tower", "audio_tower")
    )
    qformer = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = ["--audio_connector_config", json.dumps(qformer)]
    train_stage1_connectors.main(*train_stage1_connectors.parse(args.split() + options + cached(root) + TINY))


def stage2(root: Path, expert: str) -> None:
    args = f"--config {CONFIGS / 'stage2_experts.yaml'} --dataset_name {root / f'data/stage2_{expert}.jsonl'}"
    args += f" --output_dir {root / 'stage2' / expert} --learning_rate 1e-3 --num_train_epochs 1.5 --lora_r 16"
    args += f" --model_name_or_path {root / 'stage1'} --modalities {' '.join(EXPERTS[expert])}"
    train_stage2_experts.main(*train_stage2_experts.parse(args.split() + cached(root) + TINY))


def stage3(root: Path) -> None:
    args = f"--config {CONFIGS / 'stage3_moe.yaml'} --dataset_name {root / 'data/stage3.jsonl'}"
    args += f" --output_dir {root / 'stage3'} --learning_rate 1.5e-3 --num_train_epochs 1.25"
    args += f" --model_name_or_path {root / 'stage1'} --layers even --experts text= "
    args += " ".join(f"{name}={root / 'stage2' / name / 'expert'}" for name in EXPERTS)
    train_stage3_moe.main(*train_stage3_moe.parse(args.split() + cached(root) + TINY))


class Clock:
    """Prints what begins and how long it took."""

    def __init__(self) -> None:
        self.start = time.time()

    def step(self, title: str, function, *args) -> None:
        print(f"\n=== {title} ===", flush=True)
        begin = time.time()
        function(*args)
        print(f"--- {title}: {time.time() - begin:.0f} s, {time.time() - self.start:.0f} s in all", flush=True)


def side_by_side(function, jobs: list[tuple]) -> None:
    """Runs jobs in as many processes as there are cores; each job is too small to use several."""
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in [pool.submit(function, *job) for job in jobs]:
            future.result()


def demo(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    clock = Clock()
    clock.step("data: pictures, videos, sounds and voices as files", make_data.main, str(root / "data"))
    clock.step(
        "stand-ins for pretrained parts",
        side_by_side,
        pretrain,
        [(root / "parts", name) for name in ("llm", "vision_tower", "speech_tower", "audio_tower")],
    )
    clock.step("stage 1: connectors", stage1, root)
    for expert in EXPERTS:
        clock.step(f"stage 2: the {expert} expert", stage2, root, expert)
    clock.step("stage 3: mixture of experts", stage3, root)
    shutil.copytree(root / "stage3/merged", root / "model")
    clock.step("held-out questions", report, root, False)
    clock.step("the model's page for the Hub: its scores, and who works on what", card, root)
    clock.step("a handful of questions, in a process without this package", ask, root)
    print(f"\nThe model is in {root / 'model'}. {os.cpu_count()} cores, {time.time() - clock.start:.0f} s.")
    print(f"Next: .venv/bin/uni-moe doctor {root / 'model'} --data {root / 'data/test.jsonl'}")


def report(root: Path, control: bool) -> None:
    """Held-out questions, or the same with another row's media, through the command that anyone would use."""
    command = ["evaluate", str(root / "model"), "--task", "short-answers", "--data", str(root / "data/test.jsonl")]
    command += ["--max-new-tokens", "8", "--batch-size", "48"]
    command += ["--json", str(root / ("control.json" if control else "results.json"))]
    command += ["--other-media"] if control else []
    print(f"$ uni-moe {shlex.join(command)}", flush=True)
    if code := uni_moe(command):
        sys.exit(code)


def card(root: Path) -> None:
    """The checkpoint's README.md; knock-outs are for `uni-moe report`, which takes longer."""
    model, processor = (kind.from_pretrained(root / "model") for kind in (AutoModel, AutoProcessor))
    looked_at = routing_report(model, processor, str(root / "data/test.jsonl"), without=[], limit=64, num_examples=0)
    complete_card(root / "model", looked_at, root / "results.json")


def ask(root: Path) -> None:
    subprocess.run([sys.executable, "-I", str(HERE / "ask.py"), str(root)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--control", action="store_true", help="ask an existing model with another row's media")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # Half of the cores for arithmetic, the rest for the worker that reads media: more threads only get in its way.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    if args.control:
        if not (args.root / "model").is_dir():
            sys.exit(f"There is no model in '{args.root}'; run `make demo` first.")
        report(args.root, True)
    else:
        demo(args.root)


if __name__ == "__main__":
    main()
