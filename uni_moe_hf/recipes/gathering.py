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
    without: str | Path | None = None,
) -> Gathered:
    r"""
    Args:
        folders (`str`, `Path` or `list`): Searched with all folders in them, hidden ones aside. What a file is comes
            from a table (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`) that names it, from a `.txt` of the same name
            beside it, or else from the name of its folder. In a folder of which a table speaks, other files are left
            out.
        speech (`Iterable[str]`, *optional*): Names of folders whose sound is spoken language. So is that of a table
            with a column called `transcript`, `transcription` or `sentence`.
        columns (`dict[str, str]` or `list[str]`, *optional*): Of tables, as in [`load_rows`]; where the names do not
            say which column is what.
        question (`str` or `list[str]`, *optional*): What is asked about plain media, in place of
            `DEFAULT_QUESTIONS`.
        decode (`bool`, *optional*, defaults to `True`): Whether every file is read once, so that what is broken is
            left out now, and does not stop a training.
        without (`str` or `Path`, *optional*): A folder that is passed over: where rows are written.

    Returns:
        [`Gathered`].

    Raises:
        ValueError: a folder is missing, or nothing can be made of any file.
    """
    places = [Path(each) for each in ([folders] if isinstance(folders, str | Path) else folders)]
    if missing := [place for place in places if not place.is_dir()]:
        raise ValueError(f"There is no folder '{missing[0]}'; name one with media in it.")
    spoken = {str(name).strip("/") for name in speech}
    gatherer = _Gatherer(spoken, columns, question)
    for place in places:
        gatherer.walk(place, None if without is None else Path(without).resolve())
    gatherer.read_tables()
    gatherer.read_files()
    gathered = gatherer.gathered
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

    def relative(source: Any) -> Any:
        if isinstance(source, list):
            return [relative(each) for each in source]
        return os.path.relpath(source, here) if _is_file_name(source) else source

    def moved(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: relative(value) if key in ("path", *MODALITIES) else value for key, value in part.items()}

    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as out:
        for row in rows:
            messages = [{**m, "content": [*map(moved, m["content"])]} for m in row["messages"]]
            others = {name: row[name] for name in columns}
            out.write(json.dumps({"messages": messages, **others}, ensure_ascii=False) + "\n")
    os.replace(partial, file)


@dataclass
class _Folder:
    """A folder of media: its files, the folders it lies in, the first of which was given, and what rows are called."""

    path: Path
    files: list[Path]
    parts: tuple[str, ...]
    is_spoken: bool

    @property
    def task(self) -> str:
        return (self.parts[1:2] or self.parts)[0]


class _Gatherer:
    """Tables first, wherever they lie; then the files that none of them names."""

    def __init__(self, spoken: set[str], columns: Any, question: str | list[str] | None):
        self.spoken, self.columns, self.question = spoken, columns, question
        self.gathered, self.folders = Gathered(), []
        self.named: set[str] = set()
        self.covered: dict[str, str] = {}  # folder of which a table speaks -> the table

    def walk(self, root: Path, without: Path | None) -> None:
        seen = set()
        for folder, inner, names in os.walk(root, followlinks=True):
            path = Path(folder).resolve()
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            if path in seen or path == without:  # a link to where we have been
                inner.clear()
                continue
            seen.add(path)
            files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
            for file in [file for file in files if not _has_plain_name(file)]:
                files.remove(file)
                self._leave_out(repr(file.name), f"its name, in '{folder}', is no valid text; rename it")
            parts = (root.resolve().name, *Path(folder).relative_to(root).parts)
            self.folders.append(_Folder(Path(folder), files, parts, bool(self.spoken & {*parts})))

    def read_tables(self) -> None:
        """Rows of tables; the files that they name, and their folders, are theirs."""
        for folder in self.folders:
            for table in [file for file in folder.files if kind_of(file)]:
                self.covered.setdefault(str(folder.path.resolve()), str(table))
                for row in _table(table, self.columns, self.question, folder.is_spoken, self.gathered):
                    lacking, number = row.pop("_lacks_file"), row["_row"]
                    if lacking:
                        self._leave_out(f"row {number} of '{table}'", f"it names no file in '{lacking}'")
                        continue
                    for source in self._add(row, f"row {number} of '{table}'", folder):
                        self.named.add(source)
                        self.covered.setdefault(str(Path(source).parent), str(table))

    def read_files(self) -> None:
        """A row for each file that no table names."""
        for folder in self.folders:
            texts = {file.stem: file for file in folder.files if file.suffix.lower() == ".txt"}
            media = {file.stem for file in folder.files if _kind(file, False)}
            for file in folder.files:
                kind = _kind(file, folder.is_spoken)
                if str(file.resolve()) in self.named or kind_of(file) or (kind is None and file.stem in media):
                    continue
                if kind is None:
                    self._leave_out(f"'{file}'", "it is no kind of file that is known")
                    continue
                try:
                    answer = self._answer(file, folder, texts.get(file.stem))
                except ValueError as error:
                    self._leave_out(f"'{file}'", str(error))
                    continue
                row = {kind: str(file.resolve()), "answer": answer}
                row["question"] = _drawn(self.question, kind, file.name)
                self._add(row, f"'{file}'", folder)

    def _answer(self, file: Path, folder: _Folder, beside: Path | None) -> str:
        if beside is not None:
            try:
                return beside.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"the text in '{beside.name}' is not UTF-8; save it as UTF-8") from error
        if table := self.covered.get(str(file.resolve().parent)):
            raise ValueError(f"no row of '{table}' names it")
        if len(folder.parts) == 1:
            raise ValueError("nothing says what it is; put it into a folder of that name")
        return folder.path.name.replace("_", " ")

    def _add(self, row: dict[str, Any], what: str, folder: _Folder) -> list[str]:
        """Adds a row; the files that it names."""
        sources: list[str] = []
        try:
            messages = rooted(row_to_messages(row), folder.path.resolve())
            messages = [{**m, "content": [_plain_part(part) for part in parts_of([m])]} for m in messages]
            sources = [source for m in messages for part in m["content"] for source in files_of(part)]
            if lost := [source for source in sources if not Path(source).is_file()]:
                raise ValueError(f"there is no file '{lost[0][:200]}'")
            answer = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text").strip()
            if not answer:
                raise ValueError("its answer is empty")
        except (ValueError, OSError) as error:
            self._leave_out(what, " ".join(str(error).split()))
        else:
            made = {"messages": messages, "task": folder.task, "answer": answer, "_folders": folder.parts}
            self.gathered.rows.append(made)
        return sources

    def _leave_out(self, what: str, why: str) -> None:
        self.gathered.left_out.append(f"{what}: {why}")


def files_of(part: Mapping[str, Any]) -> list[str]:
    """The files that a part of a message names; none where it holds an address or the data."""
    values = [value for key, value in part.items() if key in ("path", *MODALITIES)]
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if _is_file_name(each)]


def _is_file_name(source: Any) -> bool:
    return isinstance(source, str) and "://" not in source and not source.startswith("data:")


def _has_plain_name(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    places = [name for name, role in roles.items() if role in (*MODALITIES, *MEDIA_NAMES)]
    for row in rows:
        made = {roles.get(name, name): value for name, value in row.items() if value not in (None, "")}
        kinds = [roles[name] for name in places if row.get(name) not in (None, "")]
        whole = any(name in made for name in ("messages", "conversations"))
        if kinds and not whole and not any(name in made for name in QUESTIONS):
            made["question"] = _drawn(question, kinds[0].removesuffix("s"), str(row.get("_row")))
        yield {**made, "_lacks_file": ", ".join(places) if places and not kinds and not whole else ""}


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
    default = DEFAULT_QUESTIONS["speech" if kind == "voice" else kind]
    questions = [question] if isinstance(question, str) else list(question or [default])
    return random.Random(key).choice(questions)


def _plain_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part with its source as a `path`, or a video's frames as a list, each file under one name only."""

    def plain(source: Any) -> Any:
        if isinstance(source, list):
            return [plain(each) for each in source]
        return str(Path(source).resolve()) if _is_file_name(source) else source

    kind = part["type"]
    made = {key: plain(value) if key in ("path", *MODALITIES) else value for key, value in part.items()}
    if kind in MODALITIES and isinstance(made.get(kind), str):
        made["path"] = made.pop(kind)
    return made


def _clusters(rows: list[dict[str, Any]]) -> list[int]:
    """For each row the first one that it belongs to: rows that share a file, and those that share one with these."""
    parent, first = list(range(len(rows))), {}

    def head(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for number, row in enumerate(rows):
        for part in parts_of(row["messages"]):
            for file in files_of(part):
                low, high = sorted((head(number), head(first.setdefault(file, number))))
                parent[high] = low
    return [head(number) for number in range(len(rows))]


__all__ = ["DEFAULT_QUESTIONS", "Gathered", "gather_rows", "hold_out", "write_rows"]
