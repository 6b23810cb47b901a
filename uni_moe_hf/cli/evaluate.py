"""`uni-moe evaluate`: how good a checkpoint is at a task, with intervals, beside another one and the paper."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .common import BYTES, load_checkpoint, load_config, new_command, not_negative, positive


def add_command(commands: Any) -> None:
    """Options of `uni-moe evaluate`."""
    parser = new_command(
        commands, "evaluate", "Ask a checkpoint a benchmark's questions, or your own, and score its answers.", run
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder or a Hub id")
    parser.add_argument("--task", metavar="NAME|FILE", help="a task of --list, or a YAML file of your own")
    parser.add_argument("--data", metavar="SOURCE", nargs="+", help="rows: files, a folder or a data set")
    parser.add_argument("--list", action="store_true", help="name the tasks that there are; with --task describe it")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions at once (default: 8)")
    parser.add_argument("--workers", type=not_negative, metavar="N", help="processes that read media (default: 1)")
    parser.add_argument(
        "--predictions", metavar="OUT.jsonl", help="save each answer as it is made; run again to resume"
    )
    parser.add_argument("--original-format", metavar="OUT.json", help="answers in the original's records")
    parser.add_argument("--to-lmms-eval", metavar="DIR", help="write the task and rows for lmms-eval; answers nothing")
    parser.add_argument("--json", metavar="OUT.json", help="figures as JSON ('-': print them instead of the table)")
    parser.add_argument("--other-media", action="store_true", help="control: show another row's media")
    parser.add_argument("--baseline", metavar="CHECKPOINT", help="compare with another one on the same rows")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest words where the task samples")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="in place of the task's")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="in place of the task's")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server, for tasks that are judged")
    parser.add_argument("--judge-model", default="default", metavar="NAME", help="as that server names it")
    parser.add_argument("--answers", metavar="FILE", help="right answers, where rows have none (VQA's annotations)")
    parser.add_argument("--media-root", metavar="DIR", help="where relative paths start (default: beside the file)")
    parser.add_argument("--by", metavar="COLUMN", help="what makes groups (default: task or category)")
    parser.add_argument("--split", default="train", help="of a data set (default: train)")
    parser.add_argument("--config", metavar="NAME", help="of a data set that has several")
    parser.add_argument("--columns", nargs="+", metavar="NAME=WHAT", help="such as photo=image label=answer")
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="what is asked about plain media")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of --other-media (default: 0)")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *BYTES], help="default: as saved")


def run(args: argparse.Namespace) -> int:
    """Prints the table; exit code 1 where a row could not be read."""
    from ..evaluation.tasks import load_task, task_names

    if args.list:
        sys.stdout.write(described(load_task(args.task)) if args.task else "".join(map(listed, task_names())))
        return 0
    needed = ("task", "data") if args.to_lmms_eval else ("checkpoint", "task", "data")
    if missing := [name for name in needed if not getattr(args, name)]:
        option = missing[0].upper() if missing[0] == "checkpoint" else f"--{missing[0]}"
        raise ValueError(
            f"{option} is missing: uni-moe evaluate CHECKPOINT --task NAME --data FILE (--list names tasks)."
        )
    task = chosen_task(args)
    from ..evaluation.judging import open_judge
    from ..evaluation.predictions import write_original, write_whole
    from ..evaluation.questions import load_questions

    if args.original_format and task.method != "generate":
        raise ValueError(f"Task '{task.name}' writes no answers, so there are none for --original-format.")
    judge = None
    if args.judge:
        judge = open_judge(args.judge, args.judge_model, os.environ.get("OPENAI_API_KEY"))
        judge([{"role": "user", "content": "Reply with OK."}])  # before anything is answered
    elif task.needs_judge:
        raise ValueError(
            f"Task '{task.name}' is scored by a judge: name an OpenAI-compatible server with --judge URL, or score "
            "it by something else with --metrics."
        )
    source = args.data[0] if len(args.data) == 1 else args.data
    reading = {name: getattr(args, name) for name in ("split", "config", "columns", "question", "limit", "by")}
    reading |= {"answers": args.answers, "media_root": args.media_root}
    # What is wrong with the rows is said before weights are loaded.
    questions = load_questions(task, source, **reading)
    check_files(args, task, questions)
    if args.to_lmms_eval:
        from ..evaluation.lmms_eval_tasks import export_to_lmms_eval

        name = export_to_lmms_eval(task, questions, args.to_lmms_eval)
        sys.stdout.write(
            f"lmms-eval --model uni_moe --tasks {shlex.quote(name)} --include_path {shlex.quote(args.to_lmms_eval)} "
            "--model_args pretrained=CHECKPOINT\n"
        )
        return 0
    settings = {"batch_size": args.batch_size, "workers": args.workers, "seed": args.seed, "judge": judge}
    settings |= {"media": "other" if args.other_media else "own"}
    for checkpoint in filter(None, (args.checkpoint, args.baseline)):
        load_config(checkpoint)  # that there is none is said before the other one answers
    found = _evaluate(args, args.checkpoint, args.predictions, task, questions, settings)
    baseline = None
    if args.baseline:
        other = args.predictions and beside(args.predictions)
        baseline = _evaluate(args, args.baseline, other, task, questions, settings)
    if args.original_format:
        write_original(args.original_format, found.questions, found.records)
    versions = {name: version(name) for name in ("uni-moe-hf", "transformers", "torch")}
    facts = {"checkpoint": args.checkpoint, "data": source, "limit": args.limit, "seed": args.seed, **found.to_dict()}
    facts |= {"versions": versions}
    if baseline is not None:
        differences = found.against(baseline)
        facts["baseline"] = {"checkpoint": args.baseline, **baseline.to_dict()}
        facts["difference"] = {
            group: {name: figure.to_dict() for name, figure in figures.items()}
            for group, figures in differences.items()
        }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if args.json and args.json != "-":  # before a terminal can fail
        write_whole(args.json, text)
    if args.json == "-":
        sys.stdout.write(text)
    else:
        of = ", ".join(args.data)
        sys.stdout.write(f"{args.checkpoint} on {of}, {asked_how(task)}\n{found.table(baseline)}\n")
    return int(bool(found.unreadable or found.ungraded))


def check_files(args: argparse.Namespace, task: Any, questions: Any) -> None:
    """
    Before anything is answered.

    Raises:
        ValueError: a file would be written over another one that the command reads or writes, or is a folder.
    """
    seen = {Path(str(question.row.get("_source"))).resolve(): "one of --data" for question in questions}
    seen |= {Path(name).resolve(): "--answers or the task" for name in (args.answers, args.task) if name}
    written = {"--predictions": args.predictions, "--original-format": args.original_format}
    written |= {"--json": None if args.json == "-" else args.json}
    if args.predictions and args.baseline:
        written["--predictions of the baseline"] = str(beside(args.predictions))
    if args.to_lmms_eval:
        from ..evaluation.lmms_eval_tasks import harness_name

        for ending in ("jsonl", "yaml"):
            written[f"--to-lmms-eval ({ending})"] = str(Path(args.to_lmms_eval, f"{harness_name(task)}.{ending}"))
    for option, name in written.items():
        if name is None:
            continue
        path = Path(name).resolve()
        if path in seen:
            raise ValueError(f"{option} would write over '{name}', which is {seen[path]}; name another file.")
        if path.is_dir() or not name:
            raise ValueError(f"{option} names the folder '{name or '.'}'; name a file.")
        seen[path] = option
    places = {path.resolve() for path in map(Path, filter(None, written.values()))}
    folders = {Path(name).resolve() for name in (args.checkpoint, args.baseline) if name}
    media = {Path(each).resolve() for question in questions for part in question.media for each in sources_of(part)}
    for path in places:
        if path in media or (path.exists() and folders & {*path.parents}):
            raise ValueError(
                f"'{path}' would be written over, which is of the data or of a checkpoint; name another file."
            )


def sources_of(part: Any) -> list[str]:
    """Files of a part."""
    values = [each for value in part.values() for each in (value if isinstance(value, list) else [value])]
    return [each for each in values if isinstance(each, str) and len(each) < 4096 and "\0" not in each]


def beside(predictions: str) -> Path:
    """Where the baseline's go."""
    path = Path(predictions)
    return path.with_name(f"{path.stem}.baseline{path.suffix}")


def listed(name: str) -> str:
    """A task in a line."""
    from ..evaluation.tasks import load_task

    task = load_task(name)
    takes, scored = ", ".join(task.takes) or "anything", ", ".join(task.metrics) or "likelihood"
    return f"{name:<18} {task.title} ({takes}; {scored})\n"


def described(task: Any) -> str:
    """All that a task's file says."""
    import yaml

    told = {each.name: getattr(task, each.name) for each in fields(task)}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items() if value}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110)


def asked_how(task: Any) -> str:
    """How answers came about, in a few words."""
    if task.method != "generate":
        return "likelihoods, nothing is written"
    decoding = {"do_sample": False, "max_new_tokens": 256, **task.decoding}
    how = "sampled" if decoding.pop("do_sample") else "greedy"
    return ", ".join([how, *(f"{name} {value}" for name, value in decoding.items())])


def chosen_task(args: argparse.Namespace) -> Any:
    """The task, with what the command line says otherwise."""
    from ..evaluation.tasks import load_task

    task = load_task(args.task)
    decoding = dict(task.decoding)
    if args.greedy:
        decoding = {name: value for name, value in decoding.items() if name not in ("temperature", "top_p", "top_k")}
        decoding |= {"do_sample": False}
    if args.max_new_tokens:
        decoding["max_new_tokens"] = args.max_new_tokens
    changes = {"decoding": decoding} | ({"metrics": tuple(args.metrics)} if args.metrics else {})
    return replace(task, **changes)


def _evaluate(
    args: Any, checkpoint: str, predictions: Any, task: Any, questions: Any, settings: dict[str, Any]
) -> Any:
    from ..evaluation.evaluation import evaluate

    model, processor = load_checkpoint(argparse.Namespace(**{**vars(args), "checkpoint": checkpoint}))
    try:
        return evaluate(model, processor, task, questions, predictions=predictions, **settings)
    except KeyboardInterrupt:
        kept = (
            f"the answers so far are in '{predictions}', and the same command goes on"
            if predictions
            else ("nothing is kept; --predictions FILE would keep every answer")
        )
        sys.stderr.write(f"\nInterrupted: {kept}.\n")
        raise
