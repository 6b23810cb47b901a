"""
Rows out of folders of media as people have them: tables that name files, folders named after what they hold, texts
beside files. `uni-moe data rows` writes them, some held out for evaluation.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.files_uni_moe import reason
from ..mixtures.progress import progress_bar
from ..training.checking import check_messages
from ..training.row_files import kind_of, numbered_rows, row_changes
from ..training.rows import ANSWERS, MEDIA_NAMES, PLACE, QUESTIONS, kind_of_file, parts_of, rooted, row_to_messages


# What is asked about plain media.
DEFAULT_QUESTIONS = {
    "image": "What is in the picture?",
    "video": "What is in the video?",
    "audio": "What do you hear?",
    "speech": "What is said?",
}
# Columns whose name says that what is heard is spoken language.
SPOKEN = ("transcript", "transcription", "sentence")
# Endings that `mimetypes` knows as something else.
MORE_ENDINGS = {".3gp": "video", ".oga": "audio"}


@dataclass
class Gathered:
    """
    What was made of folders.

    Args:
        rows (`list[dict]`): `messages`, with absolute paths; `task`, the folder that a row is of; and its `answer`.
        left_out (`list[str]`): Files and rows of which nothing could be made, and why.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def gather_rows(
    folders: str | Path | Iterable[str | Path],
    speech: Iterable[str] = (),
    columns: Any = None,
    question: str | list[str] | None = None,
    decode: bool = True,
) -> Gathered:
    r"""
    Args:
        folders (`str`, `Path` or `list`): Searched with all that is in them. In each folder counts what is found
            first: a table (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`) with a column that names files; a `.txt`
            of the same name beside a file; the folder's own name.
        speech (`Iterable[str]`, *optional*): Names of folders whose sound is spoken language. So is that of a table
            with a column called `transcript`, `transcription` or `sentence`.
        columns (`dict[str, str]` or `list[str]`, *optional*): Of tables, as in [`load_rows`]; where the names do not
            say which column is what.
        question (`str` or `list[str]`, *optional*): What is asked about plain media, in place of
            `DEFAULT_QUESTIONS`.
        decode (`bool`, *optional*, defaults to `True`): Whether every file is read once, so that what is broken is
            left out now, and does not stop a training.

    Returns:
        [`Gathered`].

    Raises:
        ValueError: a folder is missing, or nothing can be made of any file.
    """
    places = [Path(each) for each in ([folders] if isinstance(folders, str | Path) else folders)]
    if missing := [place for place in places if not place.is_dir()]:
        raise ValueError(f"There is no folder '{missing[0]}'; name one with media in it.")
    gathered, spoken = Gathered(), {str(name).strip("/") for name in speech}
    for place in places:
        for folder, _, names in sorted(os.walk(place)):
            files = sorted(Path(folder, name) for name in names if not name.startswith("."))
            _gather_folder(place, Path(folder), files, spoken, columns, question, gathered)
    if decode:
        _leave_out_unreadable(gathered)
    if lost := sorted(spoken - {part for row in gathered.rows for part in (row["task"], *row.pop("_folders"))}):
        raise ValueError(f"`speech` names the folder '{lost[0]}', in which no recording was found.")
    if not gathered.rows:
        hint = f" ({gathered.left_out[0]})" if gathered.left_out else ""
        raise ValueError(f"Nothing can be made of '{', '.join(map(str, places))}'{hint}.")
    return gathered


def hold_out(rows: list[dict[str, Any]], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """
    Args:
        rows (`list[dict]`): As [`gather_rows`] makes them.
        share (`float`): Of the files of every kind, in [0, 1).
        seed (`int`, *optional*, defaults to 0): Of the draw.

    Returns:
        `tuple[list[dict], list[dict]]`: rows to train on and rows held out. No file is in both.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share to hold out is {share}; it must be 0 or more, and below 1.")
    clusters: dict[int, list[dict]] = {}
    of_row = _clusters(rows)
    for number, row in enumerate(rows):
        clusters.setdefault(of_row[number], []).append(row)
    by_task: dict[str, list[list[dict]]] = {}
    for alike in clusters.values():
        by_task.setdefault(alike[0]["task"], []).append(alike)
    train, held = [], []
    for task, groups in sorted(by_task.items()):
        random.Random(f"{seed} {task}").shuffle(groups)
        count = round(share * len(groups)) if len(groups) > 1 else 0
        held += [row for group in groups[:count] for row in group]
        train += [row for group in groups[count:] for row in group]
    return train, held


def write_rows(rows: Iterable[Mapping[str, Any]], file: Path, columns: tuple[str, ...] = ()) -> None:
    """
    Args:
        rows (`Iterable[dict]`): As [`gather_rows`] makes them.
        file (`Path`): Gets a line of JSON for each, its paths relative to the file's folder.
        columns (`tuple[str]`, *optional*): What is written beside `messages`.
    """
    here = file.parent.resolve()

    def relative(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, "path": os.path.relpath(part["path"], here)} if "path" in part else dict(part)

    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as out:
        for row in rows:
            messages = [{**m, "content": [*map(relative, m["content"])]} for m in row["messages"]]
            others = {name: row[name] for name in columns}
            out.write(json.dumps({"messages": messages, **others}, ensure_ascii=False) + "\n")
    os.replace(partial, file)


def _gather_folder(
    root: Path,
    folder: Path,
    files: list[Path],
    spoken: set[str],
    columns: Any,
    question: str | list[str] | None,
    gathered: Gathered,
) -> None:
    """Rows of the files of one folder, those below it aside."""
    folders = folder.resolve().relative_to(root.resolve().parent).parts
    task = "/".join(folders[1:2]) or folders[0]
    is_spoken = bool(spoken & {*folders})
    named: set[Path] = set()

    def add(row: dict[str, Any], what: str) -> None:
        try:
            messages = rooted(row_to_messages(row), folder.resolve())
            messages = [{**m, "content": [_plain_part(part) for part in parts_of([m])]} for m in messages]
            answer = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text").strip()
            if not answer:
                raise ValueError("its answer is empty")
            paths = [part["path"] for m in messages for part in m["content"] if "path" in part]
            if lost := [path for path in paths if "://" not in path and not Path(path).is_file()]:
                raise ValueError(f"there is no file '{lost[0]}'")
        except ValueError as error:
            gathered.left_out.append(f"{what}: {' '.join(str(error).split())}")
            return
        gathered.rows.append({"messages": messages, "task": task, "answer": answer, "_folders": folders})

    for table in [file for file in files if kind_of(file)]:
        for row in _table(table, columns, question, is_spoken, gathered):
            named |= {(folder / str(value)).resolve() for value in row.pop("_files", ())}
            add(row, f"row {row['_row']} of '{table}'")
    for file in files:
        kind = _kind(file, is_spoken)
        if kind is None or file.resolve() in named:
            continue
        beside = file.with_suffix(".txt")
        if beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace").strip()
        elif named:
            gathered.left_out.append(f"'{file}': no row of the folder's table names it")
            continue
        elif folder == root:
            gathered.left_out.append(f"'{file}': nothing says what it is; put it into a folder of that name")
            continue
        else:
            text = folder.name.replace("_", " ")
        add({kind: str(file.resolve()), "question": _drawn(question, kind, file.name), "answer": text}, f"'{file}'")


def _leave_out_unreadable(gathered: Gathered) -> None:
    kept = []
    for row in progress_bar(gathered.rows, desc="reading files", unit="row"):
        try:
            check_messages(row["messages"])
        except (ValueError, OSError) as error:
            gathered.left_out.append(reason(error))
        else:
            kept.append(row)
    gathered.rows = kept


def _table(
    table: Path, columns: Any, question: str | list[str] | None, is_spoken: bool, gathered: Gathered
) -> Iterator[dict[str, Any]]:
    """Rows of a table in known columns, with what files they name."""
    try:
        rows = list(numbered_rows(table, change=row_changes(columns, None)))
    except ValueError as error:
        gathered.left_out.append(str(error))
        return
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in PLACE]
    media = {name: kind for name in names if (kind := _kind_of_column(table.parent, name, rows))}
    texts = [name for name in names if name not in media]
    spoken = is_spoken or any(name.lower() in SPOKEN for name in texts)
    roles = {name: "speech" if kind == "audio" and spoken else kind for name, kind in media.items()}
    roles |= {name: name.lower() for name in names if name.lower() in MEDIA_NAMES}
    known = {*ANSWERS, *QUESTIONS, "messages", "conversations", "answer"}
    others = [name for name in texts if name.lower() not in known and name not in roles]
    has_answer = any(name.lower() in (*ANSWERS, "messages", "conversations") for name in texts)
    if media and not has_answer and len(others) == 1:  # the one text beside a file says what it is
        roles[others[0]] = "answer"
    for row in rows:
        made = {roles.get(name, name): value for name, value in row.items() if value not in (None, "")}
        kinds = [role for role in roles.values() if role in MODALITIES]
        if kinds and not any(name in made for name in (*QUESTIONS, "messages", "conversations")):
            made["question"] = _drawn(question, kinds[0], str(row.get("_row")))
        yield {**made, "_files": [row[name] for name in media if isinstance(row.get(name), str)]}


def _kind_of_column(folder: Path, name: str, rows: list[dict[str, Any]]) -> str | None:
    """`"image"`, `"video"` or `"audio"` where a column names files of a folder; by most of them."""
    kinds = Counter(
        _kind(folder / row[name], False)
        for row in rows
        if isinstance(row.get(name), str) and len(row[name]) < 1000 and (folder / row[name]).is_file()
    )
    kinds.pop(None, None)
    return kinds.most_common(1)[0][0] if kinds else None


def _kind(file: Path, is_spoken: bool) -> str | None:
    """What a file holds, by its name."""
    kind = MORE_ENDINGS.get(file.suffix.lower()) or kind_of_file(file.name.replace(" ", "_"))
    return "speech" if kind == "audio" and is_spoken else kind


def _drawn(question: str | list[str] | None, kind: str, key: str) -> str:
    """What is asked about a file: always the same of several."""
    questions = [question] if isinstance(question, str) else list(question or [DEFAULT_QUESTIONS[kind]])
    return random.Random(key).choice(questions)


def _plain_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part with its source as a `path`."""
    kind = part["type"]
    if kind in MODALITIES and isinstance(part.get(kind), str):
        return {"type": kind, "path": part[kind], **{k: v for k, v in part.items() if k not in ("type", kind)}}
    return dict(part)


def _clusters(rows: list[dict[str, Any]]) -> list[int]:
    """For each row the first one that it belongs to: rows that share a file, and those that share one with these."""
    parent, first = list(range(len(rows))), {}

    def head(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for number, row in enumerate(rows):
        for part in parts_of(row["messages"]):
            if "path" in part:
                low, high = sorted((head(number), head(first.setdefault(part["path"], number))))
                parent[high] = low
    return [head(number) for number in range(len(rows))]


__all__ = ["DEFAULT_QUESTIONS", "Gathered", "gather_rows", "hold_out", "write_rows"]
