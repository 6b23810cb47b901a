"""`uni-moe init` writes a recipe for the parts, rows and machine at hand; `uni-moe train` runs it."""

import argparse
import contextlib
import io
import shlex
import sys
from pathlib import Path
from typing import Any

from .common import clean_up_when_terminated, new_command, register


def add_command(commands: Any) -> None:
    """Options of `uni-moe init` and `uni-moe train`."""
    text = "Write a YAML file for `uni-moe train`, with sizes that fit this machine, and a comment beside each choice."
    parser = new_command(commands, "init", text, init)
    parser.add_argument("--llm", metavar="PART", required=True, help="a folder or Hub id: Qwen3, Llama, Gemma 3, ...")
    parser.add_argument("--vision-tower", metavar="PART", help="CLIP, SigLIP, DINO or another backbone")
    parser.add_argument("--speech-tower", metavar="PART", help="a Whisper of any size")
    parser.add_argument("--audio-tower", metavar="PART", help="BEATs (also a .pt), AST, CLAP, Whisper, YAMNet")
    parser.add_argument("--data", metavar="ROWS", required=True, help="rows to train on, as `uni-moe data rows` makes")
    parser.add_argument("--test", metavar="ROWS", help="rows to evaluate on")
    parser.add_argument(
        "--task",
        default="short-answers",
        metavar="NAME",
        help="one of `uni-moe evaluate --list` (default: short-answers)",
    )
    parser.add_argument(
        "--output-dir", default="outputs/mine", metavar="DIR", help="training output (default: outputs/mine)"
    )
    parser.add_argument("--output", default="recipe.yaml", metavar="FILE", type=Path, help="default: recipe.yaml")

    parser = new_command(commands, "train", "Train the three stages that a YAML file describes, and evaluate.", train)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="as `uni-moe init` writes it")
    parser.add_argument("--again", metavar="STEP", help="delete and rerun this step and all that depend on it")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")


def init(args: argparse.Namespace) -> None:
    """Writes the file, and says what the training will take."""
    if args.output.exists():
        raise ValueError(f"'{args.output}' exists already; remove it, or name another file with --output.")
    register()
    from ..recipes.drafting import draft_recipe

    parts = {name: getattr(args, name) for name in ("llm", "vision_tower", "speech_tower", "audio_tower")}
    if args.test is not None:
        check_evaluation(["--task", args.task, "--data", args.test])
    draft = draft_recipe(parts, args.data, args.test, args.task, args.output_dir)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(draft.text, encoding="utf-8")
    lines = [f"{'stage':<12}{'trained':>14}{'of':>16}{'memory':>10}{'roughly':>10}"]
    for stage, plan in draft.plans.items():
        lines.append(
            f"{stage:<12}{plan.trained_parameters:>14,}{plan.parameters:>16,}{plan.total / 1e9:>7.1f} GB"
            f"{draft.minutes[stage]:>6.0f} min"
        )
    if max(plan.total for plan in draft.plans.values()) > draft.free:
        lines.append(f"That is more than the {draft.free / 1e9:.1f} GB that are free here; take smaller parts.")
    lines.append(f"The recipe is in '{args.output}'. Next: uni-moe train {args.output}")
    sys.stdout.write("\n".join(lines) + "\n")


def train(args: argparse.Namespace) -> None:
    """Says what begins, what is finished, and where it lies."""
    from ..recipes.recipe import read_recipe, run_recipe, steps_of

    recipe = read_recipe(args.recipe)
    if args.dry_run and args.again:
        raise ValueError("--dry-run runs nothing, and --again runs a step again; give one of the two.")
    if args.dry_run:
        for step in steps_of(recipe):
            sys.stdout.write(f"{shlex.join(step.command)}\n")
        return
    for step in steps_of(recipe):
        if step.name == "evaluation":  # before stages are trained for hours
            check_evaluation(step.command[step.command.index("evaluate") + 1 :])
    clean_up_when_terminated()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        model = run_recipe(recipe, args.again, say)
    except KeyboardInterrupt:
        sys.stderr.write("uni-moe: interrupted; the same command resumes, finished steps are kept.\n")
        raise
    sys.stdout.write(f"The model is in '{model}'. Ask it: uni-moe web {shlex.quote(str(model))}\n")


def check_evaluation(words: list[str]) -> None:
    """
    Args:
        words (`list[str]`): What `uni-moe evaluate` is to be told.

    Raises:
        ValueError: an option or the task is unknown, or the rows cannot be read.
    """
    from ..evaluation.questions import load_questions
    from . import evaluate

    parser, said = argparse.ArgumentParser(), io.StringIO()
    evaluate.add_command(parser.add_subparsers())
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(["evaluate", *words])
    except SystemExit as error:
        raise ValueError(f"'evaluation': {said.getvalue().strip().rpartition('error: ')[2]}.") from error
    names = ("split", "config", "columns", "question", "by", "answers", "media_root")
    source = args.data[0] if len(args.data) == 1 else args.data
    load_questions(
        evaluate.chosen_task(args), source, limit=args.limit or 1, **{name: getattr(args, name) for name in names}
    )
