"""Right answers and options of rows, in the forms in which benchmarks have them."""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..training.row_files import iter_rows
from ..training.rows import ANSWERS as PLAIN_ANSWERS
from ..training.rows import shortened_json
from .tasks import Task


WHOLE = ("messages", "conversations")
# A line of the original's prompts that says how to answer, and is no part of the question.
INSTRUCTION = re.compile(r"\n[^\n]*\banswer the question using a single word or phrase\.?\s*$", re.IGNORECASE)
OPTION_LINE = re.compile(r"^\s*\(?([A-Z])\s*[.):]\s*(.*?)\s*$")


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """What the first of these columns holds that a row has."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def bare_question(text: str) -> str:
    """A question without the line that says how to answer."""
    return INSTRUCTION.sub("", text).strip()


def right_answers(task: Task, row: Mapping[str, Any]) -> list[str]:
    """Of the first column that the task or training knows, or of numbered ones (`caption_1`, `caption_2`, ...)."""
    numbered = sorted(name for name in row if re.fullmatch(r"(?:caption|answer)_?\d+", name))
    names = (*task.answers, *(PLAIN_ANSWERS if not any(name in row for name in WHOLE) else ()))
    value = first_of(row, names)
    if value is None and numbered:
        value = [row[name] for name in numbered if row[name] is not None]
    return _texts(value)


def _texts(value: Any) -> list[str]:
    """Answers of a field: a text, a number, a list of them, or objects with `answer`, as VQA's annotations have it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _written_list(value)
    if isinstance(value, Mapping):
        value = value.get("answer", value.get("text"))
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts(each)]
    if value is None or isinstance(value, float) and value != value:
        return []
    text = str(value).strip()
    return [text] if text else []


def _written_list(text: str) -> Any:
    """A list or object that a table holds as text: as JSON, Python or NumPy write it; else the text."""
    if re.fullmatch(r"\s*\[\s*['\"].*['\"]\s*\]\s*", text, re.DOTALL) and re.search(r"['\"]\s+['\"]", text):
        return [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            if isinstance(found := read(text), list | tuple | dict):
                return found
    return text


def options_of(task: Task, row: Mapping[str, Any], written: str) -> dict[str, str]:
    """
    Letter -> text: of a column (a list, an object, JSON, lines, `a|b`), of columns `A`, `B`, ... or `choice_a`, ...,
    or of lines `A. ...` in the question as written.

    Raises:
        ValueError: a column holds something else.
    """
    value = first_of(row, task.options)
    if isinstance(value, str):
        found = _written_list(value)
        lines = value.splitlines() if "\n" in value.strip() else value.split("|")
        value = found if found is not value else [line.strip() for line in lines if line.strip()]
    if isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
        named = {
            str(each.get("label", letter)): each.get("text")
            for letter, each in zip(ascii_uppercase, value, strict=False)
        }
        value = {letter: text for letter, text in named.items() if text is not None}
    if isinstance(value, Mapping) and all(isinstance(value.get(name), list) for name in ("label", "text")):
        value = dict(zip(value["label"], value["text"], strict=False))  # as ARC and its kin have it
    if isinstance(value, Mapping):
        pairs = {str(letter): text for letter, text in value.items() if text is not None}
        if any(isinstance(text, Mapping | list) for text in pairs.values()):
            raise ValueError(f"its options are {shortened_json(value)}, and not letters with texts")
        return {letter: str(text) for letter, text in pairs.items()}
    if isinstance(value, list | tuple):
        texts = [str(text) for text in value if text is not None]
        if len(texts) > len(ascii_uppercase):
            raise ValueError(f"it has {len(texts)} options, more than there are letters")
        lines = [OPTION_LINE.match(text) for text in texts]
        if texts and all(line and line[1] == letter for line, letter in zip(lines, ascii_uppercase, strict=False)):
            texts = [line[2] for line in lines]
        return dict(zip(ascii_uppercase, texts, strict=False))
    for columns in (
        {letter: letter for letter in "ABCDEFGH"},
        {letter: f"choice_{letter.lower()}" for letter in "ABCDEFGH"},
    ):
        texts = {letter: _texts(row.get(name)) for letter, name in columns.items()}
        if texts["A"] and texts["B"]:
            return {letter: found[0] for letter, found in texts.items() if found}
    return written_options(written)


def written_options(text: str) -> dict[str, str]:
    """Options that stand in a question as lines `A. ...`; what follows on further lines belongs to them."""
    found: dict[str, str] = {}
    for line in bare_question(text).splitlines():
        match = OPTION_LINE.match(line)
        if match and len(found) < 26 and match[1] == ascii_uppercase[len(found)]:
            found[match[1]] = match[2]
        elif found:
            last = ascii_uppercase[len(found) - 1]
            found[last] = f"{found[last]}\n{line}".strip()
    return found if len(found) > 1 else {}


def letter_of(answer: str, options: Mapping[str, str]) -> str:
    """An answer as the letter of its option: a letter, an option's text, or its place, from 0."""
    bare = answer.strip().strip("().").strip()
    if bare in options:
        return bare
    same = [letter for letter, text in options.items() if text.strip().lower() == answer.strip().lower()]
    if len(same) == 1:
        return same[0]
    if bare.upper() in options:
        return bare.upper()
    if bare.isdecimal() and int(bare) < len(options):
        return list(options)[int(bare)]
    raise ValueError(f"its right answer {answer!r} is none of its options {dict(options)}")


def known_answers(file: Path) -> dict[Any, list[str]]:
    """
    Name of a row, or that of its picture with its question -> answers.

    Raises:
        ValueError: the file is missing or holds none.
    """
    if not file.is_file():
        raise ValueError(f"There is no file of answers '{file}'; check the path.")
    rows: Iterable[Any] = ()
    if file.suffix == ".json":
        try:
            whole = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"The file of answers '{file}' is no valid JSON ({error}).") from error
        rows = (
            next((whole[name] for name in ("annotations", "data") if name in whole), ())
            if isinstance(whole, dict)
            else whole
        )
    else:
        rows = iter_rows(str(file))
    found: dict[Any, list[str]] = {}
    for row in rows if isinstance(rows, Iterable) else ():
        if not isinstance(row, Mapping) or not (
            answers := _texts(first_of(row, ("answers", "gt", "answer", "captions")))
        ):
            continue
        if (key := first_of(row, ("question_id", "id", "index"))) is not None:
            found[str(key)] = answers
        if row.get("image_id") is not None and isinstance(row.get("question"), str):
            found[str(row["image_id"]), row["question"].strip().lower()] = answers
    if not found:
        raise ValueError(
            f"'{file}' holds no answers: it needs `annotations`, `data` or rows, with `question_id` and `answers`."
        )
    return found


__all__ = [
    "INSTRUCTION",
    "bare_question",
    "first_of",
    "known_answers",
    "letter_of",
    "options_of",
    "right_answers",
    "written_options",
]
