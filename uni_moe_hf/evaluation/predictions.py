"""
Files of predictions: a line of what they are of, then one JSON object a row, appended batch by batch. A run that was
killed goes on where it was; predictions of other questions, or of another model, are refused.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..hub.files_uni_moe import reason
from ..training.rows import PLACE
from .answering import Record
from .questions import Question


BEGINNING = b'{"predictions_of": '
FOR_READING = ("id", "group", "question", "right")  # beside an answer, for who looks at mistakes
SAMPLES = 64  # values of each weight that tell one model from another


def model_digest(model: Any) -> str:
    """Of names, shapes and some values of all weights: training changes it, saving and loading does not."""
    digest = sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(some.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


class Predictions:
    r"""
    Records of answers by row number, in memory and, where there is a file, in it.

    Args:
        path (`str` or `Path`, *optional*): `.jsonl` file; one that exists is gone on with.
        header (`dict`): What they are of; a file of something else is refused.
        questions (`list[Question]`): Whose answers they are.
        digests (`list[str]`): Of what each answer follows from.
        losses (`list[int]`, *optional*): How many each record has; predictions without.

    Attributes:
        records (`dict[int, dict]`): Row number -> record.

    Raises:
        ValueError: the file is none of predictions, or of another model, task or data.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: str | Path | None,
        header: Mapping[str, Any],
        questions: list[Question],
        digests: list[str],
        losses: list[int] | None = None,
    ):
        self.path = None if path is None else Path(path)
        self.header = dict(header)
        self.questions = {question.number: question for question in questions}
        self.digests = {question.number: digest for question, digest in zip(questions, digests, strict=True)}
        counts = losses or [0] * len(questions)
        self.losses = {question.number: count for question, count in zip(questions, counts, strict=True)}
        self.records: dict[int, Record] = {}
        self._unreadable: dict[int, str] = {}  # as the file has it: files may have been mended since
        self._file: Any = None

    def __enter__(self) -> "Predictions":
        if self.path is None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise OSError(f"Predictions cannot be written to '{self.path}': {reason(error)}.") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # on a full disk that was said before
                self._file.close()

    def _lock(self) -> None:
        """For this run alone, where the system knows locks."""
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"Another run is writing to '{self.path}'; wait for it, or name another file."
                ) from error

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that was being written when the run was killed is not there
        foreign = f"'{self.path}' exists and holds no predictions of this command; name another file."
        if not whole:
            if not BEGINNING.startswith(data[: len(BEGINNING)]):
                raise ValueError(foreign)
            self._begin()
            return
        first, *lines = whole.splitlines()
        try:
            found = json.loads(first)["predictions_of"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(foreign) from error
        if not isinstance(found, dict):
            raise ValueError(foreign)
        for name, value in self.header.items():
            if found.get(name) != value:
                raise ValueError(
                    f"'{self.path}' holds predictions of another {name} ({found.get(name)!r}, not {value!r}); name "
                    "another file, or delete it."
                )
        for number, line in enumerate(lines, start=2):
            self._take(number, line)
        if len(whole) < len(data):
            self._file.truncate(len(whole))

    def _take(self, line_number: int, line: bytes) -> None:
        """A line of a file that an earlier run left."""
        try:
            row = json.loads(line)
            number, digest = int(row.pop("row")), row.pop("digest")
            record = {name: value for name, value in row.items() if name not in FOR_READING}
            is_whole = self._is_whole(number, record)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"Line {line_number} of '{self.path}' is no prediction; delete it, and its row is asked.")
        if number not in self.questions:
            return  # of a run without --limit
        is_same = self.digests[number] == digest
        if "unreadable" in record:
            if is_same:
                self._unreadable[number] = str(record["unreadable"])
        elif not is_same:
            raise ValueError(
                f"'{self.path}' holds predictions of other data: row {number} asks something else there; name another "
                "file, or delete it."
            )
        elif "judgement" not in record or number in self.records:  # a grade of an answer that is gone is none
            self.records[number] = {**self.records.get(number, {}), **record}

    def _is_whole(self, number: int, record: Record) -> bool:
        """Whether a record has what the task makes."""
        if "unreadable" in record or number not in self.questions:
            return True
        if "judgement" in record:
            return isinstance(record["judgement"], dict) and isinstance(record.get("judged"), str)
        if count := self.losses[number]:
            return len(record["losses"]) == count and all(math.isfinite(loss) for loss in record["losses"])
        return isinstance(record["prediction"], str)

    def _begin(self) -> None:
        self._file.truncate(0)
        self._write([{"predictions_of": self.header}])

    def add(self, records: Mapping[int, Record]) -> None:
        """Keeps what is new of a batch's records, and writes it at once."""
        new = {}
        for number, record in records.items():
            known = self.records.get(number, {})
            if any(known.get(name) != value for name, value in record.items()):
                self.records[number] = {**known, **record}
                if record.get("unreadable", "") != self._unreadable.get(number):
                    new[number] = record
        if self._file is not None and new:
            self._write({**self._for_reading(number), **record} for number, record in new.items())

    def _for_reading(self, number: int) -> dict[str, Any]:
        question = self.questions[number]
        told = {"id": question.key, "group": question.group, "question": question.text}
        right = list(dict.fromkeys(question.references))
        return {"row": number, "digest": self.digests[number], **told, "right": right}

    def _write(self, lines: Any) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self._file.write(text.encode(errors="replace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"Predictions could not be written to '{self.path}': {reason(error)}. Make room; the same command "
                "goes on."
            ) from error


def write_original(path: str | Path, questions: list[Question], records: Mapping[int, Record]) -> None:
    """
    The original's own format: the list of its records, each with the model's answer as `answer` (as its 8-expert code
    has it) or, where a record holds something under that name, as `text` (as its 4-expert code has it), else as
    `prediction`: nothing is written over. Rows that could not be read get none.

    Source: `*/eval.py@f5e82dd`.
    """
    rows = []
    for question in questions:
        row = {name: value for name, value in question.row.items() if name not in PLACE}
        if "prediction" in (record := records.get(question.number, {})):
            free = next(name for name in ("answer", "text", "prediction") if name not in row or name == "prediction")
            row[free] = record["prediction"]
        rows.append(row)
    write_whole(path, json.dumps(rows, ensure_ascii=False, indent=4, default=str))


def write_whole(path: str | Path, text: str) -> None:
    """
    Writes a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path).resolve()  # what a link names, not the link
    data = text.encode(errors="backslashreplace")  # half characters as JSON escapes them
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_bytes(data)
            return
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise OSError(f"'{path}' cannot be written: {reason(error)}.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


__all__ = ["Predictions", "model_digest", "write_original", "write_whole"]
