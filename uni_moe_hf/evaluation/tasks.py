"""Tasks as data: what is asked, how it is answered, by what it is scored, and what the paper measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig

from ..hub.configuration_uni_moe import MODALITIES
from .metrics import METRICS


FOLDER = Path(__file__).parent / "task_files"
# Settings of `generate` that change what it returns.
NOT_FOR_ANSWERS = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "stop_strings")
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
        if not isinstance(self.distractors, int) or self.distractors < 0:
            raise ValueError(
                f"Task '{self.name}': `distractors` must be a number, 0 or more, got {self.distractors!r}."
            )
        if not isinstance(self.paper.get("values", {}), Mapping):
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
        try:
            self.prompt.format(question="", options="", hint="")
            self.option.format(letter="", text="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Task '{self.name}': `prompt` may hold {{question}}, {{options}} and {{hint}}, `option` {{letter}} "
                f"and {{text}}, and nothing else in braces ({error})."
            ) from error

    def _check_decoding(self) -> None:
        """What `generate` takes, and answers can be made of."""
        known = GenerationConfig().to_dict()
        for name, value in self.decoding.items():
            if name not in known or name in NOT_FOR_ANSWERS:
                raise ValueError(
                    f"Task '{self.name}': `decoding` cannot hold '{name}'; it takes settings of `generate`."
                )
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in ("max_new_tokens", "num_beams") and not (isinstance(value, int) and is_number and value > 0):
                raise ValueError(f"Task '{self.name}': `{name}` must be a whole number above 0, got {value!r}.")
            if name == "do_sample" and not isinstance(value, bool):
                raise ValueError(f"Task '{self.name}': `do_sample` must be true or false, got {value!r}.")
            if name in ("temperature", "top_p") and not (is_number and value >= 0):
                raise ValueError(f"Task '{self.name}': `{name}` must be a number, 0 or more, got {value!r}.")

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
