"""Tasks as data: what is asked, how it is answered, by what it is scored, and what the paper measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from ..hub.configuration_uni_moe import MODALITIES
from .metrics import METRICS


FOLDER = Path(__file__).parent / "task_files"
# Settings of `generate` that a task may have: least, most and kind.
DECODING = {
    "do_sample": (0, 1, bool),
    "max_new_tokens": (1, 1 << 20, int),
    "min_new_tokens": (0, 1 << 20, int),
    "num_beams": (1, 1024, int),
    "no_repeat_ngram_size": (0, 1024, int),
    "top_k": (0, 1 << 20, int),
    "temperature": (0, 100, int | float),
    "top_p": (0, 1, int | float),
    "min_p": (0, 1, int | float),
    "typical_p": (0, 1, int | float),
    "length_penalty": (-100, 100, int | float),
    "repetition_penalty": (0, 100, int | float),
    "early_stopping": (0, 1, bool),
}
MAX_DISTRACTORS = 25  # and the right answer: as many as there are letters
METHODS = ("generate", "choose", "prefer")
# Columns that may hold right answers, options, groups and names of rows, where a task names no others.
ANSWERS = ("gt", "answers", "direct_answers", "references", "captions", "answer", "label")
OPTIONS = ("options", "choices")
GROUPS = ("task", "category")
KEYS = ("question_id", "id", "index")


@dataclass(frozen=True)
class Task:
    r"""
    How rows are asked and scored. Files of tasks are YAML with these names.

    Args:
        name (`str`): Of the file, without its ending.
        title (`str`, *optional*): As people write it.
        takes (`list[str]`, *optional*): Modalities that every row must have: image, video, audio, speech.
        order (`list[str]`, *optional*): Of the media of plain rows, before the words; as the columns stand by default.
        prompt (`str`, *optional*, defaults to `"{question}"`): What plain rows are asked; `{question}`, `{options}`
            and `{hint}` are filled in. Conversations are asked as they are.
        metrics (`list[str]`): Of `METRICS`; the first is the main one. Not for `prefer`.
        method (`str`, *optional*, defaults to `"generate"`): `"generate"` writes an answer; `"choose"` takes the
            option whose words are likeliest, by their mean; `"prefer"` compares the likelihood of the right answer
            beside its own media and beside those of another row.
        decoding (`dict`, *optional*): For `generate`; greedy by default.
        answers, options, groups, keys (`list[str]`, *optional*): Columns that hold them; the first that a row has.
        option (`str`, *optional*, defaults to `"{letter}. {text}"`): How one of the `{options}` is written.
        distractors (`int`, *optional*, defaults to 0): For rows without options: how many answers of other rows of
            their group are offered beside the right one, where there are so many.
        voice (`str`, *optional*, defaults to `"speech"`): What the original's `voice` files are: speech or audio.
        paper (`dict`, *optional*): `metric`, `where` and `values`, name of a model -> what the paper reports; `note`
            where it needs one.
        notes (`str`, *optional*): What the sources leave open, what is chosen here, and the alternative.

    Raises:
        ValueError: a value is none of these.
    """

    name: str
    metrics: tuple[str, ...] = ()
    title: str = ""
    takes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    prompt: str = "{question}"
    method: str = "generate"
    decoding: Mapping[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ANSWERS
    options: tuple[str, ...] = OPTIONS
    groups: tuple[str, ...] = GROUPS
    keys: tuple[str, ...] = KEYS
    option: str = "{letter}. {text}"
    distractors: int = 0
    voice: str = "speech"
    paper: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, tuple):
                value = (value,) if isinstance(value, str) else value
                if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
                    raise ValueError(f"Task '{self.name}': `{each.name}` must be a list of names, got {value!r}.")
                object.__setattr__(self, each.name, tuple(value))
            elif each.name in ("decoding", "paper") and not isinstance(value, Mapping):
                raise ValueError(f"Task '{self.name}': `{each.name}` must be names with values, got {value!r}.")
        for name in ("name", "title", "prompt", "option", "notes"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Task '{self.name}': `{name}` must be a text, got {getattr(self, name)!r}.")
        if isinstance(self.distractors, bool) or self.distractors not in range(MAX_DISTRACTORS + 1):
            raise ValueError(f"Task '{self.name}': `distractors` must be a number, 0 to 25, got {self.distractors!r}.")
        values = self.paper.get("values", {})
        if not isinstance(values, Mapping) or not all(isinstance(each, int | float) for each in values.values()):
            raise ValueError(f"Task '{self.name}': `paper` needs `values`, a model's name -> its figure.")
        self._check_decoding()
        self._check("method", [self.method], METHODS)
        self._check("metrics", self.metrics, METRICS)
        self._check("takes", self.takes, MODALITIES)
        self._check("order", self.order, MODALITIES)
        self._check("voice", [self.voice], ("speech", "audio"))
        if (self.method == "prefer") == bool(self.metrics):
            raise ValueError(
                f"Task '{self.name}' has `method: {self.method}`: "
                + ("leave out `metrics`." if self.metrics else "give `metrics`, such as [exact_match].")
            )
        if self.method == "choose" and self.metrics != ("choice",):
            raise ValueError(f"Task '{self.name}': `method: choose` is scored by `metrics: [choice]`.")
        for name, places in (("prompt", {"question", "options", "hint"}), ("option", {"letter", "text"})):
            try:
                held = [each[1:] for each in Formatter().parse(getattr(self, name)) if each[1] is not None]
            except ValueError as error:
                raise ValueError(f"Task '{self.name}': `{name}` cannot be filled in: {error}.") from error
            if wrong := [place for place, form, how in held if place not in places or form or how]:
                known = ", ".join(f"{{{each}}}" for each in sorted(places))
                raise ValueError(f"Task '{self.name}': `{name}` may hold {known} in braces, not {{{wrong[0]}}}.")

    def _check_decoding(self) -> None:
        """What `generate` takes, and answers can be made of."""
        for name, value in self.decoding.items():
            if name not in DECODING:
                raise ValueError(
                    f"Task '{self.name}': `decoding` cannot hold '{name}'; it takes {', '.join(DECODING)}."
                )
            low, high, kind = DECODING[name]
            is_kind = (
                isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool)
            )
            if not is_kind or not low <= value <= high:
                words = {bool: "true or false", int: f"a whole number from {low}"}
                raise ValueError(
                    f"Task '{self.name}': `{name}` must be {words.get(kind, f'a number from {low} to {high}')}, got "
                    f"{value!r}."
                )

    def _check(self, name: str, values: Any, known: Any) -> None:
        for value in values:
            if value not in known:
                raise ValueError(f"Task '{self.name}': `{name}` is {value!r}; there are {', '.join(known)}.")

    @property
    def needs_options(self) -> bool:
        """Whether rows must offer options."""
        return self.method == "choose" or any(METRICS[name].needs == "options" for name in self.metrics)

    @property
    def needs_judge(self) -> bool:
        """Whether the main figure comes from a judge."""
        return bool(self.metrics) and METRICS[self.metrics[0]].needs == "judge"


def task_names() -> list[str]:
    """Tasks that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_task(task: str | Path | Task) -> Task:
    """
    Args:
        task (`str`, `Path` or [`Task`]): The name of one that comes with the package, as in [`task_names`], or a YAML
            file. A file may say `like: NAME` and only what is different.

    Raises:
        ValueError: there is no such task, or the file describes none.
    """
    if isinstance(task, Task):
        return task
    name = str(task)
    is_file = name.endswith((".yaml", ".yml")) or "/" in name
    file = Path(name) if is_file else FOLDER / f"{name}.yaml"
    if not file.is_file():
        if is_file:
            raise ValueError(f"There is no task file '{name}'; check the path.")
        near = get_close_matches(name.lower().replace("_", "-"), task_names(), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}', or a file" if near else f"there are {', '.join(task_names())}, and files"
        raise ValueError(f"There is no task '{name}'; {hint} of your own, named with its ending .yaml?")
    return Task(**_declared(file, ()))


def _declared(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"Task file '{file}' cannot be read as YAML: {text}.") from error
    if not isinstance(given, dict):
        raise ValueError(f"Task file '{file}' must hold names with values, such as `metrics: [exact_match]`.")
    known = [each.name for each in fields(Task)]
    if unknown := [str(name) for name in given if name not in (*known, "like")]:
        raise ValueError(f"Task file '{file}' says '{unknown[0]}', which is none of {', '.join([*known, 'like'])}.")
    base = {}
    if like := given.pop("like", None):
        parent = FOLDER / f"{like}.yaml"
        if not parent.is_file() or file in seen:
            raise ValueError(f"Task file '{file}' is like '{like}', which is no task of the package.")
        base = _declared(parent, (*seen, file))
        for name in ("title", "paper"):  # are the other one's
            base.pop(name, None)
    return {**base, "name": file.stem, **given}


__all__ = ["Task", "load_task", "task_names"]
