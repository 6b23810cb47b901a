"""
The three stages on real parts and real files: a small LLM, DINOv2-small, Whisper tiny.en and YAMNet learn to say what
is in a picture, what makes a sound and what is said in a recording. Two hours on two cores, ten minutes on a GPU.

    python examples/real_parts/make_data.py unpacked outputs/real_parts/data
    python examples/real_parts/run.py outputs/real_parts --llm HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision_tower facebook/dinov2-small --speech_tower openai/whisper-tiny.en \
        --audio_tower outputs/real_parts/yamnet

Trains with the example scripts, asks the finished model in a process without this package, and writes a report: losses
at both ends of every stage, and losses of held-out answers beside their own media and beside another row's.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor

from uni_moe_hf import evaluate
from uni_moe_hf.evaluation.statistics import Figure


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import train_stage1_connectors  # noqa: E402
import train_stage2_experts  # noqa: E402
import train_stage3_moe  # noqa: E402


CONFIGS = HERE.parent / "configs"
PARTS = ("llm", "vision_tower", "speech_tower", "audio_tower")
# What a small model on two cores needs instead of the paper's numbers. Every step is logged, the last one saved.
SMALL = (
    "--gradient_checkpointing false --logging_steps 1 --report_to none --dataloader_num_workers 1 --seed 0"
).split()
AT_ONCE = 16 if torch.cuda.is_available() else 8  # rows of a batch of 16
SMALL += ["--per_device_train_batch_size", str(AT_ONCE), "--gradient_accumulation_steps", str(16 // AT_ONCE)]
# Of the Q-Former that hears: a small one, for a hundred sounds.
QFORMER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = 10  # steps at each end of a stage whose losses are compared


def options(config: str, data: Path, output: Path, **settings) -> list[str]:
    """Command line of an example script."""
    made = ["--config", str(CONFIGS / config), "--dataset_name", str(data), "--output_dir", str(output), *SMALL]
    made += [] if torch.cuda.is_available() else ["--use_cpu"]
    for name, value in settings.items():
        made += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return made


def stage1(root: Path, steps: int, **more) -> None:
    settings = {"max_steps": steps, "learning_rate": 5e-4, "learning_rates": json.dumps({"vision connector": 1e-3})}
    settings |= {"image_size": 112, "num_speech_query_tokens": 16, "num_audio_query_tokens": 16}
    settings |= {"cut_speech_windows": True}
    settings |= {"audio_connector_config": json.dumps(QFORMER), **more}
    args = options("stage1_connectors.yaml", root / "data/stage1.jsonl", root / "stage1", **settings)
    train_stage1_connectors.main(*train_stage1_connectors.parse(args))


def stage2(root: Path, steps: int, expert: str, **more) -> None:
    settings = {"max_steps": steps, "learning_rate": 3e-4, "lora_r": 16}
    settings |= {"model_name_or_path": root / "stage1", "modalities": EXPERTS[expert], **more}
    data, output = root / f"data/stage2_{expert}.jsonl", root / "stage2" / expert
    args = options("stage2_experts.yaml", data, output, **settings)
    train_stage2_experts.main(*train_stage2_experts.parse(args))


def stage3(root: Path, steps: int, **more) -> None:
    experts = ["text=", *(f"{name}={root / 'stage2' / name / 'expert'}" for name in EXPERTS)]
    settings = {"max_steps": steps, "learning_rate": 3e-4, "model_name_or_path": root / "stage1", "experts": experts}
    settings |= more
    args = options("stage3_moe.yaml", root / "data/stage3.jsonl", root / "stage3", **settings)
    train_stage3_moe.main(*train_stage3_moe.parse(args))


# Expert -> the modality that it is for.
EXPERTS = {"vision": "image", "sound": "audio", "speech": "speech"}
# Folder of what is left -> title and steps.
STAGES = {
    "stage1": ("1 connectors", 500),
    "stage2/vision": ("2 the vision expert", 250),
    "stage2/sound": ("2 the sound expert", 60),
    "stage2/speech": ("2 the speech expert", 150),
    "stage3": ("3 mixture of experts", 250),
}


def train(root: Path, parts: dict[str, str], max_steps: int | None) -> dict[str, float]:
    """Stage -> minutes."""
    steps = {name: max_steps or planned for name, (_, planned) in STAGES.items()}
    # What towers give for a clip is computed once, whatever stage meets it first.
    cached = {"feature_cache": root / "features", "fill_feature_cache": True}
    jobs = {
        "stage1": partial(stage1, root, **cached, **parts),
        **{f"stage2/{name}": partial(stage2, root, expert=name, **cached) for name in EXPERTS},
        "stage3": partial(stage3, root, **cached),
    }
    noted = root / "minutes.json"
    minutes = json.loads(noted.read_text()) if noted.exists() else {}
    for name, job in jobs.items():
        if name not in minutes:  # a run that was interrupted goes on with the first stage that was not finished
            start = time.time()
            job(steps[name])
            minutes[name] = (time.time() - start) / 60
            noted.write_text(json.dumps(minutes))
    if not (root / "model").exists():
        (root / "model").symlink_to((root / "stage3/merged").resolve())
    return minutes


# ---- what was measured ----


def ends(folder: Path) -> tuple[list[float], list[float]]:
    """Losses of the first and of the last steps that the last checkpoint knows of."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    return losses[:ENDS], losses[-ENDS:]


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def held_out(folder: Path, data: Path) -> dict[str, dict[str, Figure]]:
    """Task -> its figures: how much likelier its answers are beside their own media, and how often among four."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, device_map=device).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found: dict[str, dict[str, Figure]] = {}
    for task in ("preference", "likeliest-choice"):
        done = evaluate(model, processor, task, data / "test.jsonl", batch_size=AT_ONCE, quiet=False)
        for group, figures in done.figures.items():
            found.setdefault(group, {}).update(figures)
    return found


def report(root: Path, minutes: dict[str, float]) -> str:
    config = AutoConfig.from_pretrained(root / "model", trust_remote_code=True).text_config
    llm = f"a '{config.model_type}' LLM, {config.num_hidden_layers} layers of {config.hidden_size}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    lines = [
        f"The three stages on real parts, {date.today()}: {llm}, DINOv2-small at 112 pixels, Whisper tiny.en, YAMNet; "
        f"Tux Paint's stamps and Asterisk's prompts; torch {torch.__version__}, {platform.machine()}, {device}, "
        "bfloat16 with what is trained in float32; batches of 16, one run, seed 0.",
        "",
        f"Training loss, mean of {ENDS} steps and its standard error:",
        "",
        "| stage | minutes | first steps | last steps | difference, in its standard errors |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, (title, _) in STAGES.items():
        first, last = ends(root / name)
        errors = standard_error(first), standard_error(last)
        means = statistics.mean(first), statistics.mean(last)
        lines.append(
            f"| {title} | {minutes[name]:.1f} | {means[0]:.3f} ± {errors[0]:.3f} | {means[1]:.3f} ± {errors[1]:.3f} | "
            f"{(means[0] - means[1]) / math.hypot(*errors):.1f} |"
        )
    lines += [
        "",
        "Held-out answers: loss in nats a token beside their own media and beside another row's of the same task, how "
        "often their own are preferred, and how often the answer is the likeliest of four of its task; 95 % "
        "bootstrap intervals:",
        "",
        "| after | task | answers | own media | another's | difference | own preferred | likeliest of four |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for after, folder in (("stage 1", "stage1"), ("stage 3", "model")):
        for task, figures in held_out(root / folder, root / "data").items():
            lines.append(
                f"| {after} | {task} | {figures['gain'].rows} | {figures['own_loss'].value:.3f} | "
                f"{figures['other_loss'].value:.3f} | {figures['gain']} | {figures['own_preferred']} | "
                f"{figures['choice_accuracy']} |"
            )
    command = [sys.executable, "-I", str(HERE.parent / "demo/ask.py"), str(root), "32"]
    answers = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    lines += ["", "The first held-out row of each task, asked in a process without this package:", "", "```"]
    return "\n".join([*lines, answers.rstrip(), "```"]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder with data/, as make_data.py leaves it")
    for part in PARTS:
        parser.add_argument(f"--{part}", help="Hub id or folder")
    parser.add_argument("--max_steps", type=int, help="of every stage, to try it out")
    parser.add_argument("--report", type=Path, help="file for the report; ROOT/report.md by default")
    parser.add_argument("--measure_only", action="store_true", help="report on what an earlier run left")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    root = args.root
    if args.measure_only:
        minutes = json.loads((root / "minutes.json").read_text())
    else:
        parts = {part: getattr(args, part) for part in PARTS}
        minutes = train(root, parts, args.max_steps)
    text = report(root, minutes)
    (args.report or root / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
