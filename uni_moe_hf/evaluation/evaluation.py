"""`evaluate`: a model's answers to a task's questions, their figures with intervals, and how two models compare."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mixtures.progress import progress_bar
from .answering import Record, answer_questions
from .judging import Judge, judged
from .metrics import EXPLAINED, METRICS, Answered
from .predictions import Predictions, model_digest
from .questions import Question, digest_of, load_questions, partnered
from .statistics import Contributions, Figure, mean_of
from .tasks import Task, load_task


ALL = "all"


@dataclass(repr=False)
class Evaluation:
    r"""
    What [`evaluate`] found.

    Args:
        task ([`Task`]): What was asked.
        questions (`list[Question]`): All of them.
        records (`dict[int, dict]`): Row number -> `prediction`, `losses` or `unreadable`, and `judgement`.
        media (`str`): `"own"` or `"other"`: whose media were shown.
        seconds (`float`): That answering took; of rows that an earlier run had answered nothing.
        answered_now (`int`): Rows that were answered in this time.
        without_media (`int`): Rows that were not asked, since another row's media could not stand in for theirs.

    Attributes:
        figures (`dict[str, dict[str, Figure]]`): Group (`"all"` for all rows) -> name -> figure.
        left_out (`dict[str, str]`): Metric -> why it does not apply to these rows.
    """

    task: Task
    questions: list[Question]
    records: dict[int, Record]
    media: str = "own"
    seconds: float = 0.0
    answered_now: int = 0
    without_media: int = 0
    figures: dict[str, dict[str, Figure]] = field(init=False)
    left_out: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.left_out = {}
        self.figures = {
            group: {name: each.figure() for name, each in self._contributions(questions).items()}
            for group, questions in self._groups().items()
        }

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    @property
    def unreadable(self) -> dict[int, str]:
        """Row number -> why it could not be asked."""
        return {number: each["unreadable"] for number, each in self.records.items() if "unreadable" in each}

    @property
    def main(self) -> tuple[str, Figure] | None:
        """Name and figure that the task is about, over all rows; `None` where no row could be read."""
        return next(iter(self.figures[ALL].items()), None)

    @property
    def ungraded(self) -> dict[int, str]:
        """Row number -> how a judge's reply begins that holds no grade."""
        grades = {number: each["judgement"] for number, each in self.records.items() if "judgement" in each}
        return {number: grade["ungraded"] for number, grade in grades.items() if "ungraded" in grade}

    def _groups(self, without: Collection[int] = ()) -> dict[str, list[Question]]:
        """Questions that could be read, by group; a row of several counts in each."""
        if lost := [question for question in self.questions if question.number not in self.records]:
            raise ValueError(f"{len(lost)} rows have no answer, the first of them {lost[0].name}; answer all of them.")
        unread = {*self.unreadable, *self.ungraded, *without}
        read = [question for question in self.questions if question.number not in unread]
        groups: dict[str, list[Question]] = {}
        for question in read:
            for group in question.groups:
                groups.setdefault(group, []).append(question)
        return groups | {ALL: read} if len(groups) > 1 else {ALL: read}

    def _contributions(self, questions: list[Question]) -> dict[str, Contributions]:
        if not questions:
            return {}
        if self.task.method == "prefer":
            pairs = [self.records[question.number]["losses"] for question in questions]
            gains = [other - own for own, other in pairs]
            return {
                "own_preferred": mean_of([gain > 0 for gain in gains]),
                "gain": mean_of(gains, unit=""),
                "own_loss": mean_of([own for own, _ in pairs], unit=""),
                "other_loss": mean_of([other for _, other in pairs], unit=""),
            }
        rows = [self._answered(question) for question in questions]
        return _scored(self.task, rows, self.left_out)

    def _answered(self, question: Question) -> Answered:
        record = self.records[question.number]
        if self.task.method == "choose":
            losses = record["losses"]
            said = list(question.options)[min(range(len(losses)), key=losses.__getitem__)]
        else:
            said = record["prediction"]
        grade = record.get("judgement")
        return Answered(said, question.references, question.options, question.text, question.group, grade)

    def against(self, baseline: "Evaluation") -> dict[str, dict[str, Figure]]:
        """
        Args:
            baseline ([`Evaluation`]): Of the same task and rows.

        Returns:
            `dict`: as `figures`: this one minus the baseline, over the rows that both could read; for the interval the
            same rows are drawn for both.
        """
        asked = [
            (each.task.name, each.media, {q.number: q.digest for q in each.questions}) for each in (self, baseline)
        ]
        if asked[0] != asked[1]:
            raise ValueError("A comparison needs the same task and rows for both models.")
        differences = {}
        for group, questions in self._groups({*baseline.unreadable, *baseline.ungraded}).items():
            mine, theirs = self._contributions(questions), baseline._contributions(questions)
            differences[group] = {name: mine[name].against(theirs[name]) for name in mine if name in theirs}
        return differences

    def table(self, baseline: "Evaluation | None" = None) -> str:
        """For reading: a line per group, and what stands behind the figures."""
        title = self.task.title or self.task.name
        asked = "" if self.media == "own" else ", with another row's media"
        names = list(self.figures[ALL])
        count = len(self._groups()[ALL])
        lines = [f"{title}{asked}: {count:,} row{'s' * (count != 1)}, 95 % bootstrap intervals"]
        if not names:
            lines.append("no answer got a grade" if self.ungraded else "no row could be read")
        else:
            lines += _table(self.figures, names)
        if baseline is not None and names:
            lines += ["", "the baseline:", *_table(baseline.figures, names)]
            lines += ["", "difference to the baseline, paired:", *_table(self.against(baseline), names)]
        if self.unreadable:
            number, why = min(self.unreadable.items())
            lines.append(
                f"{len(self.unreadable)} of {len(self.questions)} rows could not be read and are in no figure; the "
                f"first is row {number}: {why}"
            )
        if self.without_media:
            lines.append(f"{self.without_media} rows have no media and are not asked")
        if self.ungraded:
            number, reply = next(iter(self.ungraded.items()))
            lines.append(
                f"{len(self.ungraded)} of {len(self.questions)} answers got no grade and are in no figure; for the "
                f"first, row {number}, the judge said {reply!r}"
            )
        lines += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        lines += [f"{name}: {EXPLAINED[name]}" for name in names if name in EXPLAINED]
        lines += self._paper()
        return "\n".join(lines)

    def _paper(self) -> list[str]:
        metric, values = self.task.paper.get("metric"), self.task.paper.get("values", {})
        if metric not in self.figures[ALL] or not values or self.media != "own":
            return []
        told = "; ".join(f"{model}: {value:.2f}" for model, value in values.items())
        where = "; ".join(str(self.task.paper[name]) for name in ("where", "note") if name in self.task.paper)
        return [f"the paper's {metric} on its own rows ({where}): {told}"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task.name,
            "media": self.media,
            "rows": len(self.questions),
            "without_media": self.without_media,
            "unreadable": {str(number): why for number, why in self.unreadable.items()},
            "decoding": dict(self.task.decoding) if self.task.method == "generate" else self.task.method,
            "figures": {
                group: {name: figure.to_dict() for name, figure in figures.items()}
                for group, figures in self.figures.items()
            },
            "ungraded": {str(number): reply for number, reply in self.ungraded.items()},
            "left_out": self.left_out,
            "paper": dict(self.task.paper),
            "seconds": self.seconds,
            "answered_now": self.answered_now,
        }


def _scored(task: Task, rows: Sequence[Answered], left_out: dict[str, str]) -> dict[str, Contributions]:
    """The task's metrics; a side one that does not apply is left out, and why is noted."""
    found: dict[str, Contributions] = {}
    for name in task.metrics:
        if METRICS[name].needs == "judge" and any(row.judgement is None for row in rows):
            left_out[name] = "no judge was given"
            continue
        try:
            found |= METRICS[name].score(rows)
        except (ValueError, ImportError) as error:
            if name == task.metrics[0]:
                raise type(error)(f"Task '{task.name}' cannot be scored: {error}") from error
            left_out[name] = str(error)
    return found


def check_metrics(task: Task, questions: Sequence[Question]) -> None:
    """
    Scores empty answers, so that what a metric lacks is said before anything is answered.

    Raises:
        ValueError: the rows' right answers do not suit the task's main metric.
        ImportError: it needs a package that is missing.
    """
    if task.method != "prefer":
        grade = {"correct": False, "score": 0.0}
        rows = [Answered("", each.references, each.options, each.text, each.group, grade) for each in questions]
        _scored(task, rows, {})


def _table(figures: Mapping[str, Mapping[str, Figure]], names: Sequence[str]) -> list[str]:
    rows = [["", "rows", *names]]
    for group, found in figures.items():
        count = max((figure.rows for figure in found.values()), default=0)
        rows.append([group, f"{count:,}", *(str(found[name]) if name in found else "" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def evaluate(
    model: Any,
    processor: Any,
    task: str | Path | Task,
    rows: Any,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    media: str = "own",
    judge: Judge | None = None,
    predictions: str | Path | None = None,
    answers: str | Path | None = None,
    media_root: str | Path | None = None,
    by: str | None = None,
    workers: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    **reading: Any,
) -> Evaluation:
    r"""
    Asks a model the questions of a task and scores its answers.

    Args:
        model ([`UniMoEForConditionalGeneration`]): Wrapped by PEFT or not.
        processor ([`UniMoEProcessor`]): Of the model.
        task (`str`, `Path` or [`Task`]): A name of [`~tasks.task_names`] or a YAML file.
        rows: A file, folder or data set as in [`load_rows`], rows as dicts, or questions that
            [`~questions.load_questions`] made of them.
        batch_size (`int`, *optional*, defaults to 8): Questions at once.
        limit (`int`, *optional*): Only so many rows, the first.
        media (`str`, *optional*, defaults to `"own"`): `"other"` shows another row's media: what is right then was
            known without them.
        judge (`Callable`, *optional*): Messages of a chat -> reply, for tasks that are judged, as
            [`~judging.open_judge`] makes one.
        predictions (`str` or `Path`, *optional*): `.jsonl` file that gets every answer at once; a run that was stopped
            goes on from it.
        answers, media_root, by: As in [`~questions.load_questions`].
        reading: Its `split`, `config`, `columns` and `question`.
        workers (`int`, *optional*): Processes that read media ahead; one where there is more than one core.
        seed (`int`, *optional*, defaults to 0): Of sampling, and of whose media `"other"` shows.
        quiet (`bool`, *optional*, defaults to `False`): Whether there is no progress bar.

    Returns:
        [`Evaluation`]: figures with 95 % bootstrap intervals. Media that cannot be read are told, and in no figure.

    Raises:
        ValueError: there is no such task; a row has no answer; the model lacks a tower that the rows need; the task
            needs a judge and there is none; the predictions are of other questions or another model.

    Example:

    ```python
    >>> found = evaluate(model, processor, "short-answers", "rows.jsonl")
    >>> print(found.table())
    ```
    """
    task = load_task(task)
    if media not in ("own", "other"):
        raise ValueError(f"`media` is {media!r}; it can be 'own' or 'other'.")
    if media == "other" and task.method == "prefer":
        raise ValueError(f"Task '{task.name}' compares with another row's media by itself; leave `media` alone.")
    if task.needs_judge and judge is None:
        raise ValueError(
            f"Task '{task.name}' is scored by a judge: give one (an OpenAI-compatible server with --judge URL, or "
            "`judge=`)."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be a number of questions, 1 or more.")
    is_ready = isinstance(rows, list) and bool(rows) and all(isinstance(each, Question) for each in rows)
    every = rows if is_ready else load_questions(task, rows, answers, media_root, limit, by, **reading)
    check_modalities(processor, every)
    questions, others = partnered(every, seed) if media == "other" or task.method == "prefer" else (every, None)
    asked = others if media == "other" else questions
    check_metrics(task, questions)
    header, digests = {}, [""] * len(asked)
    if predictions is not None:  # what tells them from others is read from files and weights
        digests = _digests(task, asked, others)
        header = {
            "task": task.name,
            "model": model_digest(model),
            "media": media,
            "decoding": dict(task.decoding) if task.method == "generate" else task.method,
            "seed": seed,
        }
        if task.decoding.get("do_sample"):  # what is drawn depends on what is asked together
            header |= {"batch size": batch_size, "number of rows": len(asked)}
    losses = [len(each.options) if task.method == "choose" else 2 * (task.method == "prefer") for each in asked]
    with Predictions(predictions, header, asked, digests, losses) as kept:
        done_before = len(kept.records)
        start = time.monotonic()
        settings = {"initial": done_before, "desc": task.name, "unit": "row"}
        with progress_bar(total=len(asked), shown=not quiet, **settings) as bar:
            for records in answer_questions(
                model, processor, task, asked, others, batch_size, workers, seed, kept.records
            ):
                before = len(kept.records)
                kept.add(records)
                bar.update(len(kept.records) - before)
        seconds = time.monotonic() - start
        if judge is not None and any(METRICS[name].needs == "judge" for name in task.metrics):
            _judge(judge, asked, kept, quiet)
        answered = len(kept.records) - done_before
        return Evaluation(task, asked, kept.records, media, seconds, answered, len(every) - len(asked))


def _digests(task: Task, asked: Sequence[Question], others: Sequence[Question] | None) -> list[str]:
    """Of what each answer follows from: of likelihoods also what is compared."""
    if task.method == "generate":
        return [question.digest for question in asked]
    pairs = zip(asked, others or asked, strict=True)
    return [digest_of([mine.digest, mine.options, mine.answer, other.digest]) for mine, other in pairs]


def _judge(judge: Judge, asked: Sequence[Question], kept: Predictions, quiet: bool) -> None:
    """Grades what was not graded yet, by this judge, beside these right answers."""
    waiting, grades_of = {}, {}
    for question in asked:
        record = kept.records[question.number]
        if "prediction" not in record:
            continue
        of = digest_of([getattr(judge, "name", ""), question.references, question.text, record["prediction"]])
        if record.get("judged") != of or "ungraded" in record["judgement"]:
            waiting[question.number], grades_of[question.number] = (question, record["prediction"]), of
    with progress_bar(total=len(waiting), desc="judge", unit="answer", shown=not quiet) as bar:
        for number, grade in judged(judge, waiting):
            kept.add({number: {"judgement": grade, "judged": grades_of[number]}})
            bar.update()


def check_modalities(processor: Any, questions: Sequence[Question]) -> None:
    """
    Before anything is answered in vain.

    Raises:
        ValueError: the rows hold what the model has no tower for.
    """
    held = {
        kind: question for question in reversed(questions) for kind in {str(p.get("type")) for p in question.media}
    }
    has = list(processor.modalities)
    for kind, question in sorted(held.items(), key=lambda pair: pair[1].number):
        known = processor._ear(kind) if kind in ("audio", "speech") else kind
        if known in ("image", "video", "audio", "speech") and known not in has:
            raise ValueError(
                f"{question.name} holds {kind}, for which the model has no tower; it takes "
                f"{', '.join(['text', *has])}."
            )


__all__ = ["Evaluation", "check_metrics", "check_modalities", "evaluate"]
