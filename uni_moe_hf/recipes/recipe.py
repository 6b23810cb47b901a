"""
The three stages from one YAML file, as `uni-moe train` runs them: a chain of the example scripts, each with a YAML
file of its own that can be run by hand.

    output_dir: outputs/mine
    parts: {llm: ..., vision_tower: ..., speech_tower: ..., audio_tower: ...}
    shared: {dataset_name: rows/train.jsonl}           # options of every stage
    connectors: {learning_rate: 6.0e-4}                # stage 1
    experts:                                           # stage 2, once per expert
      vision: {modalities: [image, video]}
      speech: {modalities: [speech]}
    moe: {layers: even}                                # stage 3
    evaluation: {task: short-answers, data: rows/test.jsonl}   # `control: false` for no other media

Options have the scripts' names. `progress.json` in `output_dir` holds what is finished, and with which options.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from trl import SFTConfig

from ..training.options import ExpertArguments, MixtureArguments, PartsArguments, StageArguments
from ..training.resuming import only_run_in


PACKAGE = Path(__file__).parents[1]
SECTIONS = ("output_dir", "parts", "shared", "connectors", "experts", "moe", "evaluation", "launch")
PROGRESS = "progress.json"
# What a stage writes last, and others read.
LAST_FILES = {"connectors": "config.json", "experts": "expert/adapter_config.json", "moe": "merged/config.json"}
# Of each stage: its script and paper's numbers, and its own options.
SCRIPTS = {
    "connectors": ("stage1_connectors", PartsArguments),
    "experts": ("stage2_experts", ExpertArguments),
    "moe": ("stage3_moe", MixtureArguments),
}


@dataclass(frozen=True)
class Step:
    """
    One command of the chain.

    Args:
        name (`str`): "connectors", "experts/<name>", "moe" or "evaluation".
        command (`list[str]`): What is run.
        options (`dict`): What it is told; written to `config` before it runs.
        config (`Path`): YAML file with them; `None` for the evaluation.
        output (`Path`): What it leaves.
        proof (`Path`): The file in it, or itself, that is written last and read by whoever follows.
        follows (`tuple[str]`): Steps whose output it reads.
    """

    name: str
    command: list[str]
    options: dict[str, Any]
    config: Path | None
    output: Path
    proof: Path
    follows: tuple[str, ...]


def read_recipe(file: str | Path) -> dict[str, Any]:
    """
    Args:
        file (`str` or `Path`): A YAML file as above.

    Returns:
        `dict`: its sections.

    Raises:
        ValueError: it is no YAML, or a section or an option is missing or unknown.
    """
    try:
        recipe = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file '{file}'; write one with `uni-moe init`.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"'{file}' cannot be read as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"'{file}' holds no sections; it needs output_dir, parts, connectors, experts and moe.")
    if unknown := [name for name in recipe if name not in SECTIONS]:
        raise ValueError(f"'{file}' has the section '{unknown[0]}'{_nearest(str(unknown[0]), SECTIONS)}")
    for name in ("output_dir", "parts"):
        if not recipe.get(name):
            raise ValueError(f"'{file}' has no '{name}'; every training needs one.")
    for name, section in recipe.items():
        kind = {"output_dir": str, "launch": list}.get(name, dict)
        if section is not None and not isinstance(section, kind):
            wanted = {str: "a path", list: "a list of options of `accelerate launch`", dict: "options"}[kind]
            raise ValueError(f"'{name}' in '{file}' is {section!r}; it must be {wanted}.")
    return {name: section for name, section in recipe.items() if section is not None}


def steps_of(recipe: Mapping[str, Any]) -> list[Step]:
    """
    Args:
        recipe (`dict`): As [`read_recipe`] returns it.

    Returns:
        `list[Step]`: in the order in which they run.

    Raises:
        ValueError: an option is unknown or missing, or an expert is named that no step trains.
    """
    root = Path(recipe["output_dir"])
    shared, launch = dict(recipe.get("shared", {})), [str(each) for each in recipe.get("launch", [])]
    given = recipe.get("experts", {})
    if wrong := [name for name in given if not str(name).isidentifier() or name == "text"]:
        raise ValueError(
            f"An expert is called {wrong[0]!r}; take letters, digits and underscores, and not `text`, which is the "
            "plain LLM's network."
        )
    if wrong := [name for name, options in given.items() if not isinstance(options, dict | None)]:
        raise ValueError(f"'experts/{wrong[0]}' is {given[wrong[0]]!r}; it must be options, `modalities` among them.")
    experts = {str(name): dict(options or {}) for name, options in given.items()}
    stage1 = str(root / "connectors")
    steps = [_stage("connectors", "connectors", root, launch, shared | recipe["parts"], recipe.get("connectors"), ())]
    for name, options in experts.items():
        own = {"model_name_or_path": stage1} | options
        steps.append(_stage("experts", f"experts/{name}", root, launch, shared, own, ("connectors",)))
    moe = dict(recipe.get("moe", {}))
    if "moe" in recipe or experts:
        grown = moe.get("experts", ["text", *experts])
        if not isinstance(grown, list):
            wanted = ", ".join(["text", *experts])
            raise ValueError(f"`experts` of 'moe' is {grown!r}; it must be a list, such as [{wanted}].")
        moe["experts"] = [_expert(each, experts, root) for each in grown]
        follows = ("connectors", *(f"experts/{name}" for name in experts))
        steps.append(_stage("moe", "moe", root, launch, shared, {"model_name_or_path": stage1} | moe, follows))
    if "evaluation" in recipe:
        steps += _evaluation(dict(recipe["evaluation"]), root, steps[-1])
    return steps


def run_recipe(
    recipe: Mapping[str, Any], again: str | None = None, say: Callable[[str], Any] = lambda line: None
) -> Path:
    """
    Runs what is not finished, in order; a stage that was interrupted goes on from its last checkpoint.

    Args:
        recipe (`dict`): As [`read_recipe`] returns it.
        again (`str`, *optional*): A step to run again, and with it all that follow from it; what they left is removed.
        say (`Callable[[str]]`, *optional*): Gets a line for each step that begins, ends or is passed over.

    Returns:
        `Path`: the finished model.

    Raises:
        ValueError: a step failed; or one was trained with other options than the recipe has now.
    """
    steps, root = steps_of(recipe), Path(recipe["output_dir"])
    if again is not None and again not in (names := [step.name for step in steps]):
        raise ValueError(f"There is no step '{again}'; there are {', '.join(names)}.")
    root.mkdir(parents=True, exist_ok=True)
    with only_run_in(root):
        progress = _Progress(root / PROGRESS)
        forgotten = [] if again is None else _all_that_follow(again, steps)
        for step in steps:  # before anything is trained, or removed, in vain
            if step not in forgotten:
                progress.check(step)
        for step in forgotten:
            progress.forget(step)
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            if progress.is_finished(step):
                say(f"{title}: finished before, in '{step.output}'")
                continue
            if progress.is_stale(step):
                say(f"{title}: what it left is of an earlier run of {' or '.join(step.follows)}, and is removed")
                progress.forget(step)
            say(f"{title}: {step.config or ' '.join(step.command)}")
            progress.begin(step)
            start = time.time()
            _run(step)
            progress.finish(step, time.time() - start)
            say(f"{title}: {time.time() - start:.0f} s, in '{step.output}'")
    return _model_of(root, steps)


def _model_of(root: Path, steps: list[Step]) -> Path:
    """Where the last stage leaves its model."""
    return root / "moe" / "merged" if any(step.name == "moe" for step in steps) else root / "connectors"


def _stage(
    stage: str,
    name: str,
    root: Path,
    launch: list[str],
    shared: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    follows: tuple[str, ...],
) -> Step:
    script, kind = SCRIPTS[stage]
    known = {field.name: field for each in (StageArguments, SFTConfig, kind) for field in fields(each) if field.init}
    options = dict(shared) | dict(own or {})
    if ours := [option for option in ("output_dir", "resume_from_checkpoint") if option in options]:
        raise ValueError(f"'{name}' has the option '{ours[0]}', which the chain sets itself; leave it out.")
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"'{name}' has the option '{unknown[0]}'{_nearest(str(unknown[0]), known)}")
    needed = [field.name for field in fields(kind) if field.init and _is_required(field)]
    for option in ("dataset_name", *needed):
        if not options.get(option):
            raise ValueError(f"'{name}' has no `{option}`; {known[option].metadata.get('help', 'give one.')}")
    for each in (StageArguments, kind):  # each looks at its values
        names = {field.name for field in fields(each) if field.init}
        try:
            each(**{option: value for option, value in options.items() if option in names})
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{name}': {error}") from error
    folder = _examples()
    paper = yaml.safe_load((folder / "configs" / f"{script}.yaml").read_text(encoding="utf-8"))
    output, config = root / name, root / f"{name}.yaml"
    options = paper | options | {"output_dir": str(output)}
    file = str(folder / f"train_{script}.py")
    command = [sys.executable, file]
    if launch:
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, file]
    command += ["--config", str(config), "--resume_from_checkpoint", "last"]
    return Step(name, command, options, config, output, output / LAST_FILES[stage], follows)


def _evaluation(options: dict[str, Any], root: Path, last: Step) -> Iterator[Step]:
    """The questions, and as a control the same with another row's media."""
    options = {name: value for name, value in options.items() if value is not None}
    if ours := [option for option in ("json", "other_media", "checkpoint") if option in options]:
        raise ValueError(f"'evaluation' has the option '{ours[0]}', which the chain sets itself; leave it out.")
    for option in ("task", "data"):
        if not options.get(option):
            raise ValueError(f"'evaluation' has no `{option}`; it needs a task (`uni-moe evaluate --list`) and rows.")
    model = root / "moe" / "merged" if last.name == "moe" else last.output
    runs = {"evaluation": []} | ({"evaluation_other_media": ["--other-media"]} if options.pop("control", True) else {})
    for name, more in runs.items():
        output = root / f"{name}.json"
        command = [sys.executable, "-m", "uni_moe_hf.cli", "evaluate", str(model), "--json", str(output), *more]
        for option, value in options.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            command += [f"--{str(option).replace('_', '-')}", *map(str, values)] if value is not False else []
        # The control belongs to the questions: it is asked again where they are.
        yield Step(name, command, options, None, output, output, (last.name, *runs)[: 1 + len(more)])


def _expert(entry: Any, experts: Mapping[str, Any], root: Path) -> str:
    """`name=folder` as stage 3 takes it: of an expert of stage 2 its name is enough; `text` is the plain LLM."""
    name, sign, folder = str(entry).partition("=")
    if sign:
        return f"{name}={folder}"
    if name in experts:
        return f"{name}={root / 'experts' / name / 'expert'}"
    if name == "text":
        return "text="
    raise ValueError(
        f"'moe' grows the expert '{name}', which no step trains; add it to 'experts', or give `{name}=FOLDER`, or "
        f"`{name}=` for the plain LLM's network."
    )


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean '{near[0]}'?" if near else f", which is unknown here; known are {', '.join(known)}."


def _examples() -> Path:
    """The scripts: in an installed package beside its modules, in a checkout beside the package."""
    for folder in (PACKAGE / "examples", PACKAGE.parent / "examples"):
        if (folder / "train_stage1_connectors.py").is_file():
            return folder
    raise ImportError("The example scripts are not installed beside this package; install it again.")


def _all_that_follow(name: str, steps: list[Step]) -> list[Step]:
    """A step, and those that read what it leaves."""
    found = {name}
    for step in steps:
        if found & {*step.follows}:
            found.add(step.name)
    return [step for step in steps if step.name in found]


def _run(step: Step) -> None:
    """In a process of its own, which ends with this one: its memory goes back, whatever it was."""
    if step.config is not None:
        step.config.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(step.options, sort_keys=False, allow_unicode=True)
        step.config.write_text(text, encoding="utf-8")
    command = [*step.command]
    if step.config is not None and "disable_tqdm" not in step.options and not sys.stderr.isatty():
        command += ["--disable_tqdm", "true"]
    child = subprocess.Popen(command)
    try:
        code = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code:
        raise ValueError(
            f"'{step.name}' failed with exit code {code}; see its output above. Fix the problem and run the same "
            "command again: finished steps are kept, and an interrupted stage resumes from its last checkpoint."
        )


class _Progress:
    """What is finished, and with which options each step was begun; a file, written at every change."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.steps = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if not isinstance(self.steps, dict) or not all(isinstance(each, dict) for each in self.steps.values()):
                raise ValueError("it holds no steps")
        except (ValueError, OSError) as error:
            raise ValueError(f"'{file}' cannot be read ({error}); remove it to begin again.") from error

    def is_stale(self, step: Step) -> bool:
        """Whether what is there was made of another run of what it follows."""
        noted = self.steps.get(step.name, {})
        return "follows" in noted and noted["follows"] != self._runs(step) and step.output.exists()

    def _runs(self, step: Step) -> dict[str, str | None]:
        """Which run of each step that it follows there is."""
        return {name: self.steps.get(name, {}).get("run") for name in step.follows}

    def check(self, step: Step) -> None:
        """
        Raises:
            ValueError: the step was begun with other options, and left something.
        """
        before = self.steps.get(step.name, {}).get("options")
        if before is None or not step.output.exists():
            return
        now = _plain(step.options)
        changed = sorted(name for name in {*before, *now} if not _is_same(before.get(name), now.get(name)))
        if changed:
            name = changed[0]
            raise ValueError(
                f"'{step.name}' was begun with {name}={before.get(name)!r}, and the recipe now has {now.get(name)!r}; "
                f"train it again with `--again {step.name}`, or name another output_dir."
            )

    def is_finished(self, step: Step) -> bool:
        """Whether it is, what it left is there, and what it was made of is still the same."""
        noted = self.steps.get(step.name, {})
        return noted.get("seconds") is not None and step.proof.exists() and not self.is_stale(step)

    def begin(self, step: Step) -> None:
        """Notes its options; a run that goes on stays the same run."""
        run = self.steps.get(step.name, {}).get("run") if step.output.exists() else None
        self.steps[step.name] = {
            "options": _plain(step.options), "run": run or uuid.uuid4().hex, "follows": self._runs(step),
        }  # fmt: skip
        self._write()

    def finish(self, step: Step, seconds: float) -> None:
        """Notes how long it took."""
        self.steps[step.name]["seconds"] = round(seconds, 1)
        self._write()

    def forget(self, step: Step) -> None:
        """Removes what it left."""
        self.steps.pop(step.name, None)
        if step.output.is_dir():
            shutil.rmtree(step.output)
        step.output.unlink(missing_ok=True)
        self._write()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.steps, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


def _is_same(before: Any, now: Any) -> bool:
    """Whether two values are, or two spellings of one path."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_is_same, before, now))
    if isinstance(before, str) and isinstance(now, str) and before != now:
        heads = [text.rpartition("=")[0] for text in (before, now)]  # `name=folder`
        paths = [os.path.realpath(text.rpartition("=")[2]) for text in (before, now)]
        return heads[0] == heads[1] and paths[0] == paths[1] and os.path.exists(paths[0])
    return before == now


class _StrictLoader(yaml.SafeLoader):
    """Refuses a name that stands twice, of which the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"'{twice[0]}' stands there twice")
        return super().construct_mapping(node, deep)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    return json.loads(json.dumps(options, default=str))


__all__ = ["Step", "read_recipe", "run_recipe", "steps_of"]
