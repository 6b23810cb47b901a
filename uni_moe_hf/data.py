"""
From data set rows to training batches: rows of either format become messages, messages become tensors and labels.

Rows keep paths; media are read when a batch is made. Rows with different modalities, or none, mix freely.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .media_uni_moe import check_waveform, load_frames, load_image, load_waveform
from .processing_uni_moe import UniMoEProcessor


logger = logging.get_logger(__name__)


class UniMoEDataCollator:
    r"""
    Makes a training batch of rows with any mix of modalities. Only what the assistant says is learned.

    Args:
        processor ([`UniMoEProcessor`]): Of the model.
        max_length (`int`, *optional*): Longest row in tokens, media included. A longer row loses its end, unless media
            would be cut: then the row is skipped.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): Whether rows that cannot be processed are skipped and
            counted instead of stopping the training.
        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.
        media_root (`str` or `Path`, *optional*): Folder that relative paths start from; else that of the file from
            which [`load_rows`] read the row, else the working directory.
        describe_rows (`bool`, *optional*, defaults to `False`): Whether batches carry `rows`, a description of each.

    Attributes:
        skipped (`Counter`): Why rows were skipped, and how often, in this process.

    Source: labels as in `*/train/data.py@f5e82dd`: the answer and its `</s>`.
    """

    def __init__(
        self,
        processor: UniMoEProcessor,
        max_length: int | None = None,
        skip_bad_rows: bool = False,
        voice: str = "speech",
        media_root: str | Path | None = None,
        describe_rows: bool = False,
    ):
        self.processor = processor
        self.max_length = max_length
        self.skip_bad_rows = skip_bad_rows
        self.voice = voice
        self.media_root = None if media_root is None else Path(media_root)
        self.describe_rows = describe_rows
        self.skipped: Counter[str] = Counter()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`): Each with `messages`, or in the original format (see [`row_to_messages`]).

        Returns:
            Model inputs as [`UniMoEProcessor.__call__`] makes them, with `labels` `(B, T)`, -100 where nothing is
            learned.

        Raises:
            ValueError: a row cannot be processed (unless `skip_bad_rows`), or no row of the batch is left; it names
                the row and what is wrong.
        """
        named = [(describe_row(row), self._messages(row)) for row in rows]
        named = [(name, messages) for name, messages in named if messages]
        try:
            batch = self._encode([messages for _, messages in named]) if named else {}
        except ValueError:
            named = [(name, messages) for name, messages in named if self._is_readable(name, messages)]
            batch = self._encode([messages for _, messages in named]) if named else {}
        if batch and self.max_length is not None:
            batch = self._shortened(named, batch)
        if not batch:
            raise ValueError(f"No row of this batch of {len(rows)} can be used: {dict(self.skipped)}.")
        return batch | {"rows": [name for name, _ in named]} if self.describe_rows else batch

    def _messages(self, row: Mapping[str, Any]) -> list[dict] | None:
        """A row as messages with rooted paths; `None` when it is skipped."""
        root = self.media_root or row.get("_root")
        try:
            messages = row_to_messages(row, self.voice)
            _parts(messages)
            return _rooted(messages, None if root is None else Path(root))
        except ValueError as error:
            self._refuse(describe_row(row), error)
            return None

    def _encode(self, conversations: list[list[dict]]) -> dict[str, Any]:
        try:
            batch = self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"padding": True, "padding_side": "right"},
            )
        except TemplateError as error:
            raise ValueError(f"The chat template refuses a row: {error}") from error
        labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        for token_id in self._placeholder_ids:  # media in an answer are shown, not learned
            labels = labels.masked_fill(labels == token_id, -100)
        if not (labels != -100).any(dim=1).all():
            raise ValueError(
                "there is no assistant text to learn; remove the row, or check that the chat template marks answers "
                "with `generation`."
            )
        return {**batch, "labels": labels}

    @property
    def _placeholder_ids(self) -> list[int]:
        return [getattr(self.processor, f"{modality}_token_id") for modality in MODALITIES]

    def _is_readable(self, name: str, messages: list[dict]) -> bool:
        try:
            self._encode([messages])
        except ValueError as error:
            self._refuse(name, error)
            return False
        return True

    def _refuse(self, name: str, error: ValueError) -> None:
        """Skips a row, or stops."""
        if not self.skip_bad_rows:
            raise ValueError(f"{name} cannot be used: {error}") from error
        self._skip("unreadable", f"{name}: {error}")

    def _shortened(self, named: list[tuple[str, list[dict]]], batch: dict[str, Any]) -> dict[str, Any]:
        """Rows cut to `max_length`, without those whose media or whole answer lie behind it."""
        if batch["input_ids"].shape[1] <= self.max_length:
            return batch
        placeholders = self._placeholder_ids
        kept = []
        for row, (name, messages) in enumerate(named):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            detail = f"{name}: {int(batch['attention_mask'][row].sum())} tokens"
            if any(token in placeholders for token in ids[self.max_length :].tolist()):
                self._skip("media beyond max_length", detail)
            elif not (labels[: self.max_length] != -100).any():
                self._skip("answer beyond max_length", detail)
            else:
                kept.append((name, messages))
        if len(kept) < len(named):
            batch = self._encode([messages for _, messages in kept]) if kept else {}
            named[:] = kept
        per_token = ("input_ids", "attention_mask", "labels")
        return {key: value[:, : self.max_length] if key in per_token else value for key, value in batch.items()}

    def _skip(self, reason: str, detail: Any) -> None:
        self.skipped[reason] += 1
        logger.warning("Skipped a row (%s: %s); %d skipped so far.", reason, detail, self.skipped.total())


def _rooted(messages: list[dict], root: Path | None) -> list[dict]:
    """The same messages, relative paths joined to `root`."""

    def rooted(value: Any) -> Any:
        if isinstance(value, list):  # a video as a list of frames
            return [rooted(item) for item in value]
        if isinstance(value, Mapping):
            return {**value, "path": rooted(value.get("path"))}
        is_path = isinstance(value, str | Path) and not str(value).startswith(("http://", "https://", "data:"))
        return str(root / value) if is_path else value

    def rooted_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") == "text":
            return part
        keys = (part.get("type"), "path")
        return {key: rooted(value) if key in keys else value for key, value in part.items()}

    if root is None:
        return messages
    return [
        message
        if isinstance(message.get("content"), str | None)
        else {**message, "content": [rooted_part(part) for part in message["content"]]}
        for message in messages
    ]


def row_to_messages(row: Mapping[str, Any], voice: str = "speech") -> list[dict[str, Any]]:
    r"""
    Args:
        row (`dict`): Either `{"messages": [...]}` in the library's format, or the original's record:
            `{"conversations": [{"from": "human" | "gpt", "value": "<image>\n..."}], "image": path, "voice": [paths],
            "video": [frame paths]}`, where each `<image>`, `<audio>` and `<video>` takes the next file.
        voice (`str`, *optional*, defaults to `"speech"`): Whether `voice` files are `"speech"` or `"audio"`.

    Returns:
        `list[dict]`: messages with typed parts.

    Raises:
        ValueError: neither format, or placeholders and files differ in number.

    Source: `*/train/data.py@f5e82dd`; records as in the original's `data_sample`.
    """
    if row.get("messages") is not None:
        return [_without_empty(message) for message in row["messages"]]
    if row.get("conversations") is None:
        raise ValueError(f"A row needs 'messages' or 'conversations', got the keys {sorted(row)}.")

    sounds = row.get("voice") or []
    frames = row.get("video")
    files = {
        "<image>": [row["image"]] if isinstance(row.get("image"), str) else list(row.get("image") or []),
        "<audio>": [sounds] if isinstance(sounds, str) else list(sounds),
        "<video>": [frames] if frames else [],  # one video, as the list of its frames
    }
    kinds = {"<image>": "image", "<audio>": voice, "<video>": "video"}
    queues = {placeholder: iter(names) for placeholder, names in files.items()}
    used: Counter[str] = Counter()
    messages = []
    turns = row["conversations"]
    if turns and turns[0].get("from") != "human":
        turns = turns[1:]  # as the original does
    for turn in turns:
        parts = []
        for piece in re.split(r"\n?(<image>|<audio>|<video>)\n?", turn.get("value") or ""):
            if piece in kinds:
                used[piece] += 1
                parts.append({"type": kinds[piece], kinds[piece]: next(queues[piece], None)})
            elif piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": "user" if turn.get("from") == "human" else "assistant", "content": parts})
    for placeholder, names in files.items():
        if used[placeholder] != len(names):
            raise ValueError(
                f"A row has {used[placeholder]} {placeholder} in its conversation but {len(names)} such files; "
                "they must be as many."
            )
    return messages


def _without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the fields that a common schema, as Parquet has one, fills into every part."""
    content = message.get("content")
    if isinstance(content, list):
        content = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    return {**message, "content": content}


def row_modalities(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """
    Args:
        row (`dict`): In either format; nothing is read from disk.

    Returns:
        `tuple(tuple[str], int)`: which modalities it has, in the order of `MODALITIES`, and its length in words.
    """
    parts = [
        part
        for message in row_to_messages(row)
        for part in (
            [{"type": "text", "text": message["content"]}]
            if isinstance(message.get("content"), str)
            else message["content"]
        )
    ]
    kinds = {part.get("type") for part in parts}
    words = sum(len(str(part.get("text") or "").split()) for part in parts)
    return tuple(modality for modality in MODALITIES if modality in kinds), words


def describe_row(row: Mapping[str, Any]) -> str:
    """
    Args:
        row (`dict`): In either format.

    Returns:
        `str`: its number and file, where [`load_rows`] read it, else how it begins.
    """
    if row.get("_row") is not None:
        return f"Row {row['_row']} of '{row['_source']}'"
    # Piece by piece: every row of every batch is described, and some hold a whole waveform.
    beginning = ""
    for piece in json.JSONEncoder(default=str).iterencode(row.get("messages") or row.get("conversations")):
        beginning += piece
        if len(beginning) >= 100:
            break
    return f"The row that begins with {beginning[:100]}"


def load_rows(
    source: str | Path | Mapping[str, float], split: str = "train", streaming: bool = False, seed: int = 0
) -> Any:
    r"""
    Args:
        source (`str`, `Path` or `dict[str, float]`): A `.json` (one list), `.jsonl` or `.parquet` file of rows in
            either format, or a data set that `datasets.load_dataset` finds. Or several of them with weights: how
            often an epoch shows each of its rows, 2.0 twice, 0.5 a random half.
        split (`str`, *optional*, defaults to `"train"`): Split of such a data set.
        streaming (`bool`, *optional*, defaults to `False`): Whether rows are read while they are used. Streams are
            divided among processes and workers.
        seed (`int`, *optional*, defaults to 0): Of what weights draw.

    Returns:
        `datasets.Dataset` or `IterableDataset`. Media stay paths, relative to their file: nothing is decoded. Rows of
        files know their number (from 1) and file.

    Raises:
        ValueError: a file is missing, or no JSON list, lines of objects or Parquet; a weight is not positive.
        ImportError: `datasets` is needed and missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Loading rows needs `datasets`: `pip install uni-moe-hf[train]`.") from error
    if isinstance(source, Mapping):
        return _mixture(datasets, source, split, streaming, seed)
    path = Path(source)
    if path.suffix not in READERS:
        return datasets.load_dataset(str(source), split=split, streaming=streaming)
    if not path.is_file():
        raise ValueError(f"Data file '{path}' does not exist; check the path.")
    if streaming:
        # Every shard reads the lines and keeps its own: cheap beside media, and nothing is counted beforehand.
        shards = {"path": str(path), "shard": list(range(NUM_SHARDS))}
        return datasets.IterableDataset.from_generator(_stream, gen_kwargs=shards)
    rows = list(_numbered(path))
    if not rows:
        raise ValueError(f"Data file '{path}' holds no rows.")
    # Columns are those of the first row, so every row gets all. Parts have other keys for each modality; a common
    # schema would fill every part with all of them.
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key) for key in columns} for row in rows]
    return datasets.Dataset.from_list(rows, on_mixed_types="use_json")


def _mixture(datasets: Any, sources: Mapping[str, float], split: str, streaming: bool, seed: int) -> Any:
    if not sources or any(not isinstance(weight, int | float) or weight <= 0 for weight in sources.values()):
        raise ValueError(f"Sources need positive weights, got {dict(sources)}.")
    parts = {name: load_rows(name, split, streaming) for name in sources}
    if streaming:
        total = sum(sources.values())
        shares = [weight / total for weight in sources.values()]
        return datasets.interleave_datasets(
            list(parts.values()), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
        )
    chosen = []
    for name, rows in parts.items():
        whole, rest = divmod(sources[name], 1)
        extra = rows.shuffle(seed=seed).select(range(round(rest * len(rows))))
        chosen += [rows] * int(whole) + [extra] * bool(len(extra))
    return datasets.concatenate_datasets(chosen)


def _numbered(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file with where they stand."""
    number = 0
    for number, row in enumerate(READERS[path.suffix](path), start=1):
        if not isinstance(row, dict):
            raise ValueError(f"Row {number} of '{path}' is a {type(row).__name__}, not an object.")
        yield {**row, "_row": number, "_source": str(path), "_root": str(path.parent)}


def _stream(path: str, shard: list[int]) -> Iterator[dict[str, Any]]:
    for row in _numbered(Path(path)):
        if row["_row"] % NUM_SHARDS in shard:
            yield row


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Data file '{path}' is no valid json ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"Data file '{path}' must hold a non-empty list of objects, one per row.")
    yield from rows


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8", newline="\n") as lines:  # other line breaks may stand in JSON strings
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"Data file '{path}' is no valid jsonl (line {number}: {error}).") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"Data file '{path}' is no valid parquet ({error}).") from error


NUM_SHARDS = 64  # of a stream: at most as many readers share it
READERS = {".json": _json_rows, ".jsonl": _json_lines, ".parquet": _parquet_rows}


def check_rows(
    source: str | Path, modalities: Iterable[str] = MODALITIES, voice: str = "speech", decode: bool = True
) -> Iterator[tuple[int, str]]:
    r"""
    Looks for rows that training could not use.

    Args:
        source (`str` or `Path`): A file as in [`load_rows`].
        modalities (`Iterable[str]`, *optional*): What the model has towers for; all by default.
        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.
        decode (`bool`, *optional*, defaults to `True`): Whether media are decoded, and not only looked for.

    Yields:
        `tuple(int, str)`: number of a row, from 1, and why it cannot be used.

    Raises:
        ValueError: the file itself cannot be read.
    """
    path = Path(source)
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(f"'{path}' is no {', '.join(READERS)} file; check the path.")
    allowed, number = set(modalities), 0
    for row in _numbered(path):
        number = row["_row"]
        try:
            messages = row_to_messages(row, voice)
            _parts(messages)
            _check_row(_rooted(messages, path.parent), allowed, decode)
        except ValueError as error:
            yield number, str(error)
    if not number:
        raise ValueError(f"Data file '{path}' holds no rows.")


def _check_row(messages: list[dict], allowed: set[str], decode: bool) -> None:
    turns = [message for message in messages if message.get("role") != "system"]
    if not turns or [turn.get("role") for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles must alternate user, assistant, got {[message.get('role') for message in messages]}")
    for part in _parts(messages):
        if part.get("type") != "text":
            _check_part(part.get("type"), part, allowed, decode)


def _parts(messages: list[dict]) -> list[Mapping[str, Any]]:
    """All parts of a conversation from which something can be learned."""
    found, answers = [], ""
    for message in messages:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content or []
        if isinstance(parts, list):
            parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(f"the content of a {message.get('role')} message is neither text nor a list of parts")
        found += parts
        if message.get("role") == "assistant":
            answers += "".join(str(part.get("text") or "") for part in parts)
    if not answers.strip():
        raise ValueError("there is no assistant text to learn")
    return found


def _check_part(kind: Any, part: Mapping[str, Any], allowed: set[str], decode: bool) -> None:
    if kind not in MODALITIES:
        raise ValueError(f"a part has the type {kind!r}; known are text, {', '.join(MODALITIES)}")
    if kind not in allowed:
        raise ValueError(f"it has {kind}, for which the model has no tower")
    source = next((part[key] for key in (kind, "path", "url", "base64") if part.get(key) is not None), None)
    if source is None:
        raise ValueError(f"a part of type '{kind}' has no source")
    for each in source if isinstance(source, list) and kind == "video" else [source]:
        is_url = str(each).startswith(("http://", "https://", "data:"))
        is_file = isinstance(each, str) and not is_url and "base64" not in part
        if is_file and not Path(each).is_file():
            raise ValueError(f"there is no file '{each}'")
    if decode:
        if kind == "image":
            load_image(source)
        elif kind == "video":
            load_frames(source, 2)
        else:
            check_waveform(load_waveform(source))


__all__ = [
    "UniMoEDataCollator",
    "check_rows",
    "describe_row",
    "load_rows",
    "row_modalities",
    "row_to_messages",
]
