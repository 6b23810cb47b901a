"""
Our tasks in lmms-eval: a folder for its `--include_path` with a YAML file and the rows of a data file, and the
functions that the YAML names.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..hub.conversations_uni_moe import SOURCE_KEYS
from ..training.rows import rooted
from .metrics import METRICS, Answered
from .questions import Question
from .tasks import Task


MODULE = __name__
FIGURES = {figure: name for name, metric in METRICS.items() for figure in metric.figures}


def export_to_lmms_eval(task: Task, questions: Sequence[Question], folder: str | Path) -> str:
    """
    Writes `uni_moe_<task>.yaml` and the rows beside it.

    Args:
        task ([`Task`]): One whose answers are generated.
        questions (`list[Question]`): Of it.
        folder (`str` or `Path`): For `lmms-eval --include_path`; other tasks in it stay.

    Returns:
        `str`: the task's name in lmms-eval.

    Raises:
        ValueError: lmms-eval cannot run the task as it is.
    """
    if task.method != "generate":
        raise ValueError(f"Task '{task.name}' compares likelihoods, which tasks for chat models in lmms-eval cannot.")
    if judged := [name for name in task.metrics if METRICS[name].needs == "judge"]:
        raise ValueError(f"Task '{task.name}' is scored by a judge ('{judged[0]}'); choose others with --metrics.")
    name, folder = harness_name(task), Path(folder).resolve()
    lines = [
        json.dumps({"question": json.dumps(_plain(question)), "metrics": list(task.metrics)}) for question in questions
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figures = [figure for metric in task.metrics for figure in METRICS[metric].figures]
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {**task.decoding, "until": []},  # else answers would end at an empty line
        "doc_to_visual": Function("doc_to_visual"),
        "doc_to_text": Function("doc_to_text"),
        "doc_to_messages": Function("doc_to_messages"),
        "doc_to_target": Function("doc_to_target"),
        "process_results": Function("process_results"),
        "metric_list": [
            {
                "metric": figure,
                "aggregation": Function(f"figure_{figure}"),
                "higher_is_better": METRICS[FIGURES[figure]].figures[figure] is not False,
            }
            for figure in figures
        ],
        "metadata": {"version": 1.0},
    }
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(
        f"# {task.title or task.name}, written by `uni-moe evaluate`.\n{text}", encoding="utf-8"
    )
    return name


def harness_name(task: Task) -> str:
    """What a task is called there, and its files."""
    return f"uni_moe_{re.sub(r'[^A-Za-z0-9_]', '_', task.name)}"


class Function(str):
    """A function of this module, as lmms-eval's YAML names one."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", f"{MODULE}.{name}", style="")
)


def _plain(question: Question) -> dict[str, Any]:
    """Without the row it was made of, in JSON; files by paths that hold from anywhere."""
    made = {name: value for name, value in asdict(question).items() if name not in ("row", "name")}
    made["messages"] = rooted(question.messages, Path.cwd())
    try:
        json.dumps(made)
    except TypeError as error:
        raise ValueError(
            f"{question.name} holds media in memory, which a file of rows cannot; give them as files ({error})."
        ) from error
    return made


def _question(doc: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(doc["question"])


# --- What the YAML names


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages in the harness' form: media by `url`; speech is `audio` there, and says so in `modality`."""
    made = []
    for message in _question(doc)["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        made.append({"role": message["role"], "content": [_harness_part(part) for part in parts]})
    return made


def _harness_part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return dict(part)
    source = next(part[key] for key in (kind, *SOURCE_KEYS) if part.get(key) is not None)
    return {"type": "audio" if kind == "speech" else kind, "url": source, "modality": kind}


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The sources of all media, for models without messages."""
    parts = [part for message in doc_to_messages(doc) for part in message["content"]]
    return [part["url"] for part in parts if part["type"] != "text"]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """All that is written."""
    parts = [part for message in doc_to_messages(doc) for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """A right answer."""
    return _question(doc)["references"][0]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Figure -> the answer and what it is compared with."""
    question = _question(doc)
    answered = {"prediction": results[0].strip(), "question": question["text"], "group": ", ".join(question["groups"])}
    answered |= {"references": question["references"], "options": question["options"]}
    return {figure: answered for name in doc["metrics"] for figure in METRICS[name].figures}


def _aggregation(figure: str) -> Callable[[list[dict[str, Any]]], float]:
    def aggregate(items: list[dict[str, Any]]) -> float:
        rows = [Answered(**item) for item in items]
        return METRICS[FIGURES[figure]].score(rows)[figure].figure().value

    aggregate.__name__ = f"figure_{figure}"
    return aggregate


def __getattr__(name: str) -> Any:
    """`figure_<name>`: the figure of all rows, the same as `uni-moe evaluate`'s."""
    figure = name.removeprefix("figure_")
    if name.startswith("figure_") and figure in FIGURES:
        return _aggregation(figure)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "doc_to_messages",
    "doc_to_target",
    "doc_to_text",
    "doc_to_visual",
    "export_to_lmms_eval",
    "process_results",
]
