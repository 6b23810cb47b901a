"""
From rows to questions: what is asked, with which media, and what the right answer is.

Takes rows in any form that training takes, and the original's records for evaluation as they lie: answers in fields of
their own, media without a place in the text, paths from a root that is elsewhere.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.media_uni_moe import MEDIA_COLUMNS, MEDIA_NAMES
from ..training.row_files import iter_rows, row_changes
from ..training.rows import ANSWERS as PLAIN_ANSWERS
from ..training.rows import (
    PLACE,
    QUESTIONS,
    check_characters,
    describe_row,
    is_nothing,
    parts_of,
    rooted,
    row_to_messages,
)
from .metrics import normalize_answer
from .references import (
    INSTRUCTION,
    WHOLE,
    bare_question,
    first_of,
    known_answers,
    letter_of,
    options_of,
    right_answers,
)
from .tasks import Task


BLOCK = 4096  # bytes


@dataclass(frozen=True)
class Question:
    """
    Args:
        number (`int`): Its place among the rows, from 1.
        messages (`list[dict]`): What the model is asked, media in their parts.
        references (`list[str]`): Right answers; letters where there are options.
        options (`dict[str, str]`): Letter -> text.
        text (`str`): The question as written, without how to answer.
        groups (`tuple[str]`): What it is counted with.
        key (`str`): Name of the row.
        name (`str`): Its number and file, for messages.
        answer (`str`): A right answer in words, for likelihoods.
        row (`dict`): As it was read.
    """

    number: int
    messages: list[dict]
    references: list[str]
    options: dict[str, str] = field(default_factory=dict)
    text: str = ""
    groups: tuple[str, ...] = ()
    key: str = ""
    name: str = ""
    answer: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def media(self) -> list[Mapping[str, Any]]:
        """All parts that are not text."""
        return [part for part in parts_of(self.messages) if part.get("type") != "text"]

    @property
    def group(self) -> str:
        """All its groups as one name."""
        return ", ".join(self.groups)

    @cached_property
    def digest(self) -> str:
        """Of what is asked; files of media by their names and contents."""
        return digest_of(self.messages)


def digest_of(value: Any, names: bool = True) -> str:
    """Of anything that JSON holds, and of media in memory; files count by content and, if wanted, by name."""
    return sha256(json.dumps(_identity(value, names), sort_keys=True).encode(errors="replace")).hexdigest()[:12]


def _identity(value: Any, names: bool) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _identity(each, names) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(each, names) for each in value]
    if isinstance(value, str | Path) and 0 < len(str(value)) < 1000 and "\n" not in str(value):
        with suppress(OSError, ValueError):
            if (path := Path(value)).is_file():
                return [path.name * names, path.stat().st_size, _glimpse(path)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "tobytes"):  # a picture or an array
        return sha256(value.tobytes()).hexdigest()
    return sha256(value).hexdigest() if isinstance(value, bytes) else f"<{type(value).__name__}>"


def _glimpse(path: Path) -> str:
    """Of the beginning, middle and end of a file, which tell clips of one length apart."""
    size, seen = path.stat().st_size, sha256()
    with path.open("rb") as file:
        for place in (0, size // 2, max(0, size - BLOCK)):
            file.seek(place)
            seen.update(file.read(BLOCK))
    return seen.hexdigest()[:12]


def load_questions(
    task: Task,
    rows: Any,
    answers: str | Path | None = None,
    media_root: str | Path | None = None,
    limit: int | None = None,
    by: str | None = None,
    split: str = "train",
    config: str | None = None,
    columns: Any = None,
    question: str | list[str] | None = None,
) -> list[Question]:
    """
    Args:
        task ([`Task`]): What is made of rows.
        rows: A source as in [`~row_files.load_rows`], or rows as dicts.
        answers (`str` or `Path`, *optional*): A file with the answers, for rows without: VQA's or TextVQA's
            annotations, or rows with `question_id` and `answers`.
        media_root (`str` or `Path`, *optional*): Folder that paths start from; else that of the file.
        limit (`int`, *optional*): First rows to take; all by default.
        by (`str`, *optional*): Column that makes groups, in place of the task's. Rows without one are grouped by their
            modalities.
        split, config, columns, question: As in [`~row_files.load_rows`].

    Raises:
        ValueError: a row is no question of this task, has no right answer, or the source cannot be read.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"`limit` is {limit!r}; it must be a number of rows, 1 or more.")
    reading = {"split": split, "config": config, "columns": columns, "question": question}
    known = known_answers(Path(answers)) if answers is not None else {}
    found = []
    for row in single_questions(_numbered(rows, reading)):
        if limit is not None and len(found) == limit and not task.distractors:  # these are drawn from all rows
            break
        try:
            found.append(_question(task, row, len(found) + 1, known, media_root, by))
        except ValueError as error:
            raise ValueError(f"{describe_row(row)} cannot be evaluated: {error}.") from error
    if not found:
        raise ValueError("There are no rows to evaluate.")
    if by is not None and all(question.row.get(by) is None for question in found):
        raise ValueError(f"No row has the column '{by}' that is to make groups; they have {_columns(found[0].row)}.")
    if task.distractors:
        found = _with_distractors(found, task.distractors)[:limit]
    if task.needs_options:
        for question in found:
            if len(question.options) < 2:
                raise ValueError(
                    f"{question.name} cannot be evaluated: it offers no options (looked for "
                    f"{', '.join(task.options)}, the columns A, B, ..., and lines 'A. ...' in the question)."
                )
    return found


def with_other_media(questions: list[Question], seed: int = 0) -> list[Question]:
    """
    Args:
        questions (`list[Question]`): Some of which have media.
        seed (`int`, *optional*, defaults to 0): Of who gets whose.

    Returns:
        `list[Question]`: the same, each with the media of another row that holds the same kinds: of its group where
        there is one.

    Raises:
        ValueError: none has media, or all with a row's kinds show the same.
    """
    shuffler = random.Random(seed)
    alike: dict[tuple, list[int]] = {}
    for index, question in enumerate(questions):
        if kinds := tuple(part.get("type") for part in question.media):
            alike.setdefault((question.group, kinds), []).append(index)
    if not alike:
        raise ValueError("No row has media, so there are no other row's to ask with.")
    shown = [[digest_of(part, names=False) for part in question.media] for question in questions]
    result = list(questions)
    for (_, kinds), indices in alike.items():
        shuffler.shuffle(indices)
        elsewhere = [index for (_, same), found in alike.items() if same == kinds for index in found]
        differ = len({tuple(shown[index]) for index in indices}) > 1
        for place, target in enumerate(indices):
            # The next that shows something else throughout: several questions may be about one picture.
            ring = (*indices[place + 1 :], *indices[:place]) if differ else ()
            apart = partial(_differences, shown[target])
            source = next((index for index in ring if apart(shown[index]) == len(kinds)), None)
            if source is None:
                source = max((*ring, *elsewhere), key=lambda index, apart=apart: apart(shown[index]))
            if not apart(shown[source]):
                raise ValueError(
                    f"{questions[target].name} shows the only {' and '.join(map(str, kinds))} that there is, so no "
                    "other row's media can stand in; give more rows."
                )
            result[target] = replace(questions[target], messages=_replaced(questions[target], questions[source].media))
    return result


def partnered(questions: list[Question], seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Those with media, and the same with another row's, as in [`with_other_media`]."""
    questions = [question for question in questions if question.media] or questions
    return questions, with_other_media(questions, seed)


def _differences(one: list[str], other: list[str]) -> int:
    return sum(mine != theirs for mine, theirs in zip(one, other, strict=True))


def _replaced(question: Question, media: list[Mapping[str, Any]]) -> list[dict]:
    """The messages, their media in order replaced by others of the same kinds."""
    queue = iter(media)
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [p if p.get("type") == "text" else next(queue) for p in message["content"]]}
        for message in question.messages
    ]


# --- Rows


def _numbered(rows: Any, reading: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(rows, str | Path | Mapping):
        yield from iter_rows(rows, **reading)
        return
    rows = list(rows) if isinstance(rows, Iterator) else rows
    change = row_changes(reading["columns"], reading["question"])
    if isinstance(rows, list | tuple) and rows and all(isinstance(each, str | Path) for each in rows):
        yield from iter_rows(list(rows), **reading)
        return
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} is a {type(row).__name__}, not an object with fields.")
        place = {"_row": number, "_source": "the rows given"}
        yield change({**place, **{name: value for name, value in row.items() if value is not None}})


def single_questions(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """RACE's own files have several questions about one article in a row; each becomes a row."""
    for row in rows:
        lists = [row.get(name) for name in ("questions", "options", "answers")]
        if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists}) > 1:
            yield row
            continue
        kept = {name: value for name, value in row.items() if name not in ("questions", "options", "answers")}
        for question, options, answer in zip(*lists, strict=True):
            yield {**kept, "question": question, "options": options, "answer": answer}


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(name for name in row if name not in PLACE)


def _question(task: Task, row: dict, number: int, known: Mapping, media_root: Any, by: str | None) -> Question:
    if row.get("_unreadable"):
        raise ValueError(row["_unreadable"])
    messages, written, ended = _asked(task, row)
    if not messages:
        raise ValueError("it asks nothing")
    kinds = {part.get("type") for part in parts_of(messages)}
    if missing := [kind for kind in task.takes if kind not in kinds]:
        raise ValueError(
            f"the task '{task.name}' is about {' and '.join(task.takes)}, and it holds no {missing[0]}; say which "
            f"column is one with columns (NAME={missing[0]})"
        )
    key = first_of(row, task.keys)
    key = str(number if key is None else key)
    options = options_of(task, row, written)
    answers = known.get(key) or known.get((key, bare_question(written).lower())) or right_answers(task, row) or ended
    if known and not answers:
        raise ValueError(f"the file of answers has none for '{key}'")
    if not answers:
        raise ValueError(
            f"it has no right answer (looked for {', '.join(task.answers)}, and an assistant's message); name its "
            "column with columns (NAME=answer), or give a file of answers"
        )
    references = [letter_of(answer, options) for answer in answers] if options and task.needs_options else answers
    groups = _groups(row, (by,) if by else task.groups)
    for text in (*references, *groups, key, *options, *options.values()):
        check_characters(text, "an answer, option or name")
    root = media_root or row.get("_root")
    return Question(
        number=number,
        messages=rooted(messages, None if root is None else Path(root)) if kinds - {"text"} else messages,
        references=references,
        options=options,
        text=bare_question(written) or str(row.get("spoken", "")),
        groups=groups or ("+".join(k for k in MODALITIES if k in kinds) or "text",),
        key=key,
        name=describe_row(row),
        answer=options.get(references[0]) or Counter(answers).most_common(1)[0][0],
        row=row,
    )


def _asked(task: Task, row: dict) -> tuple[list[dict], str, list[str]]:
    """What is asked, the question as written, and what the row's last turn answers."""
    lower = {name.lower(): name for name in row}
    place = {name: row[name] for name in PLACE if name in row}
    media = {n: row[lower[n]] for n in MEDIA_NAMES if n in lower and not is_nothing(row[lower[n]])}
    system = {"system": row["system"]} if row.get("system") else {}
    whole = next((lower[name] for name in WHOLE if name in lower), None)
    pair = all(isinstance(row.get(name), list) for name in ("prompt", "completion"))
    if whole or pair:
        names = [whole] if whole else ["prompt", "completion"]
        kept = {name: row[name] for name in names} | media | system | place
        if whole and whole == lower.get("conversations"):
            kept[whole] = _with_marks(row[whole], media, task.order)
        messages = row_to_messages(kept, task.voice)
        ended = []
        while messages and messages[-1].get("role") == "assistant":
            ended = [part.get("text", "") for part in parts_of([messages[-1]]) if part.get("type") == "text"]
            messages = messages[:-1]
        asked = [message for message in messages if message.get("role") == "user"][-1:]
        written = "\n".join(str(p.get("text", "")) for p in parts_of(asked) if p.get("type") == "text")
        return messages, written, [text for text in ["".join(ended).strip()] if text]
    prompt, question = filled_prompt(task, row)
    if question is None:
        spare = _spare_texts(task, row)
        remedy = f"say which column it is with columns ({spare[0] if spare else 'NAME'}=question)"
        if not media:
            raise ValueError(f"it has the fields {_columns(row)}, and neither a question nor media; {remedy}")
        if spare and "{question}" in task.prompt:  # media alone may ask by themselves, but here is more
            raise ValueError(f"it has no question, and nothing is made of its column '{spare[0]}'; {remedy}")
    asked = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "-"}]
    (message,) = row_to_messages({"messages": asked} | media | place, task.voice)[:-1]
    if isinstance(message["content"], list):
        rank = {kind: number for number, kind in enumerate(task.order)}
        parts = [part for part in message["content"] if part["type"] != "text" or part["text"]]
        message = {**message, "content": sorted(parts, key=lambda part: rank.get(part["type"], len(rank)))}
    before = [{"role": "system", "content": row["system"]}] if system else []
    return [*before, message], question or prompt, []


def filled_prompt(task: Task, row: Mapping[str, Any]) -> tuple[str, str | None]:
    """
    What a plain row is asked, and its question as written, where it has one.

    Raises:
        ValueError: the question is no text.
    """
    question, hint, options = first_of(row, QUESTIONS), row.get("hint"), options_of(task, row, "")
    if question is not None and not isinstance(question, str):
        raise ValueError(f"the question is a {type(question).__name__}, not a text")
    has_instruction = INSTRUCTION.search("\n" + task.prompt) is not None
    filled = {
        "question": bare_question(f"\n{question}") if question and has_instruction else question or "",
        "hint": f"Hint: {hint}\n" if isinstance(hint, str) and hint.strip() and hint != "nan" else "",
        "options": "\n".join(task.option.format(letter=name, text=text) for name, text in options.items()),
    }
    prompt = task.prompt.format(**filled).strip()
    if INSTRUCTION.search("\n" + str(row.get("spoken", ""))):  # it was said
        prompt = bare_question(f"\n{prompt}")
    return prompt, question


def _spare_texts(task: Task, row: Mapping[str, Any]) -> list[str]:
    """Columns with words that nothing is made of."""
    used = {*task.answers, *task.options, *task.groups, *task.keys, *PLAIN_ANSWERS, *PLACE, *MEDIA_NAMES, *QUESTIONS}
    used |= {"spoken", "hint", "system", *ascii_uppercase}
    numbered = re.compile(r"(?:caption|answer)_?\d+|choice_[a-z]|.*(?:id|name|path|file|source)", re.IGNORECASE)
    return [
        name
        for name, value in row.items()
        if isinstance(value, str) and value.strip() and name not in used and not numbered.fullmatch(name)
    ]


def _with_marks(turns: Any, media: Mapping[str, Any], order: tuple[str, ...] = ()) -> Any:
    """The original's turns, media that have no place in them put first, as MMBench's rows need it."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
        return turns
    text = "".join(str(turn.get("value", "")) for turn in turns if isinstance(turn, Mapping))
    missing = []
    for kind, names in MEDIA_COLUMNS.items():
        for name in (name for name in names if name in media):
            mark = f"<{'audio' if kind == 'voice' else kind}>"
            if mark not in text:
                files = (
                    media[name] if isinstance(media[name], list) and not (kind, name) == ("video", "video") else [0]
                )
                missing += [mark] * len(files)
    first = next((index for index, turn in enumerate(turns) if turn.get("from") in ("human", "user")), None)
    if not missing or first is None:
        return turns
    missing.sort(key=lambda mark: order.index(mark[1:-1]) if mark[1:-1] in order else len(order))
    value = "\n".join([*missing, str(turns[first].get("value", ""))])
    return [*turns[:first], {**turns[first], "value": value}, *turns[first + 1 :]]


def _groups(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """A row of several categories counts in each."""
    value = first_of(row, names)
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    # "all" is the name of all rows together.
    return tuple(dict.fromkeys(f"{each} (group)" if str(each) == "all" else str(each) for each in values))


# --- Options of those without


def _with_distractors(questions: list[Question], count: int) -> list[Question]:
    """Options for those without: the right answer among up to `count` others of their group, by a draw that stays."""
    pools: dict[str, dict[str, str]] = {}  # group -> normalised -> answer
    for question in questions:
        pools.setdefault(question.group, {}).setdefault(normalize_answer(question.answer), question.answer)
    everywhere = sorted({bare: answer for pool in pools.values() for bare, answer in pool.items()}.items())
    sorted_pools = {group: sorted(pool.items()) for group, pool in pools.items()}
    made = []
    for question in questions:
        if question.options:
            made.append(question)
            continue
        right = {normalize_answer(answer) for answer in question.references}
        drawn = random.Random(f"{question.key} {question.text}")
        others: list[str] = []
        for pool in (sorted_pools[question.group], everywhere):
            sample = drawn.sample(pool, min(count + len(right), len(pool)))
            others = others or [answer for bare, answer in sample if bare not in right][:count]
        if not others:
            raise ValueError(
                f"{question.name} cannot be evaluated: it has no options, and no other row has another answer that "
                "could be one; give options or more rows."
            )
        texts = [*others, question.answer]
        drawn.shuffle(texts)
        options = dict(zip(ascii_uppercase, texts, strict=False))
        letters = [letter for letter, text in options.items() if text == question.answer]
        made.append(replace(question, options=options, references=letters))
    return made


__all__ = [
    "Question",
    "digest_of",
    "filled_prompt",
    "load_questions",
    "partnered",
    "single_questions",
    "with_other_media",
]
