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

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.conversations_uni_moe import SOURCE_KEYS
from ..hub.media_uni_moe import check_waveform, load_frames, load_image, load_waveform
from ..hub.processing_uni_moe import UniMoEProcessor
from .row_files import READERS, check_characters, numbered_rows


logger = logging.get_logger(__name__)

# What stands where every row of a batch was skipped, and how many such batches may follow each other.
EMPTY_ROW = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
MAX_BARREN = 100


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
            which [`~row_files.load_rows`] read the row, else the working directory.
        describe_rows (`bool`, *optional*, defaults to `False`): Whether batches carry `rows`, a description of each,
            and `num_skipped`.

    A batch of which every row is skipped becomes one empty row without labels, so that training goes on.

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
        self._barren = 0  # batches in succession of which nothing could be used

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`): Each with `messages`, or in the original format (see [`row_to_messages`]).

        Returns:
            Model inputs as [`UniMoEProcessor.__call__`] makes them, with `labels` `(B, T)`, -100 where nothing is
            learned.

        Raises:
            ValueError: a row cannot be processed (unless `skip_bad_rows`); it names the row and what is wrong. Or
                nothing of a hundred batches in succession could be used.
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
        self._barren = 0 if batch else self._barren + 1
        if self._barren > MAX_BARREN:
            raise ValueError(f"No row of the last {MAX_BARREN} batches could be used: {dict(self.skipped)}.")
        skipped = len(rows) - len(named)
        if not batch:
            named = [(f"an empty row in place of {len(rows)} that were skipped", EMPTY_ROW)]
            batch = self._encode([EMPTY_ROW], learned=False)
        if self.describe_rows:
            batch |= {"rows": [name for name, _ in named], "num_skipped": skipped}
        return batch

    def _messages(self, row: Mapping[str, Any]) -> list[dict] | None:
        """A row as messages with rooted paths; `None` when it is skipped."""
        root = self.media_root or row.get("_root")
        try:
            return _rooted(_learnable(row_to_messages(row, self.voice)), None if root is None else Path(root))
        except ValueError as error:
            self._refuse(describe_row(row), error)
            return None

    def _encode(self, conversations: list[list[dict]], learned: bool = True) -> dict[str, Any]:
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
        if not learned:
            labels = labels.fill_(-100)
        elif not (labels != -100).any(dim=1).all():
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

    def rooted_part(part: Mapping[str, Any]) -> dict[str, Any]:
        keys = () if part.get("type") == "text" else (part.get("type"), "path")
        return {key: rooted(value) if key in keys else value for key, value in part.items()}

    if root is None:
        return messages
    return [
        message
        if isinstance(message["content"], str)
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
        ValueError: neither format, something of it is not what it should be, or placeholders and files differ in
            number.

    Source: `*/train/data.py@f5e82dd`; records as in the original's `data_sample`.
    """
    if row.get("messages") is not None:
        return [_checked_message(message) for message in _objects(row["messages"], "messages")]
    if row.get("conversations") is None:
        raise ValueError(f"A row needs 'messages' or 'conversations', got the keys {sorted(row)}.")

    files = {
        "<image>": _listed(row.get("image")),
        "<audio>": _listed(row.get("voice")),
        "<video>": [row["video"]] if row.get("video") else [],  # one video, perhaps as the list of its frames
    }
    kinds = {"<image>": "image", "<audio>": voice, "<video>": "video"}
    queues = {placeholder: iter(names) for placeholder, names in files.items()}
    used: Counter[str] = Counter()
    messages = []
    turns = _objects(row["conversations"], "conversations")
    if turns and turns[0].get("from") != "human":
        turns = turns[1:]  # as the original does
    for turn in turns:
        if turn.get("from") not in SPEAKERS:
            raise ValueError(f"a turn is by {turn.get('from')!r}; known are {list(SPEAKERS)}")
        parts = []
        for piece in re.split(r"\n?(<image>|<audio>|<video>)\n?", _checked_text(turn.get("value") or "")):
            if piece in kinds:
                used[piece] += 1
                parts.append({"type": kinds[piece], kinds[piece]: next(queues[piece], None)})
            elif piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": SPEAKERS[turn["from"]], "content": parts})
    for placeholder, names in files.items():
        if used[placeholder] != len(names):
            raise ValueError(
                f"A row has {used[placeholder]} {placeholder} in its conversation but {len(names)} such files; "
                "they must be as many."
            )
    return messages


SPEAKERS = {"human": "user", "gpt": "assistant"}


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"'{name}' is not a list of objects but {_shortened_json(value)}")
    return value


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _checked_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text or a list of parts, without the fields that a common schema fills into parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _checked_text(content)}
    if not isinstance(content, list) or not all(isinstance(part, str | Mapping) for part in content):
        raise ValueError(f"the content of a {message.get('role')} message is neither text nor a list of parts")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
    for part in parts:
        if part.get("type") == "text":
            _checked_text(part.get("text", ""))
    return {**message, "content": parts}


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a text is a {type(text).__name__}: {_shortened_json(text)}")
    check_characters(text, "a text")
    return text


def _shortened_json(value: Any) -> str:
    """How a value begins, piece by piece: some hold a whole waveform."""
    beginning = ""
    for piece in json.JSONEncoder(default=str).iterencode(value):
        beginning += piece
        if len(beginning) >= 100:
            break
    return beginning[:100]


def row_modalities(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """
    Args:
        row (`dict`): In either format; nothing is read from disk.

    Returns:
        `tuple(tuple[str], int)`: which modalities it has, in the order of `MODALITIES`, and its length in words.
    """
    parts = _parts(row_to_messages(row))
    kinds = {part.get("type") for part in parts}
    words = sum(len(part.get("text", "").split()) for part in parts if part.get("type") == "text")
    return tuple(modality for modality in MODALITIES if modality in kinds), words


def describe_row(row: Mapping[str, Any]) -> str:
    """
    Args:
        row (`dict`): In either format.

    Returns:
        `str`: its number and file, where [`~row_files.load_rows`] read it, else how it begins.
    """
    if row.get("_row") is not None:
        return f"Row {row['_row']} of '{row['_source']}'"
    return f"The row that begins with {_shortened_json(row.get('messages') or row.get('conversations'))}"


def check_rows(
    source: str | Path, modalities: Iterable[str] = MODALITIES, voice: str = "speech", decode: bool = True
) -> Iterator[tuple[int, str]]:
    r"""
    Looks for rows that training could not use.

    Args:
        source (`str` or `Path`): A file as in [`~row_files.load_rows`].
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
    allowed, number = {modalities} if isinstance(modalities, str) else set(modalities), 0
    for row in numbered_rows(path):
        number = row["_row"]
        try:
            _check_row(_rooted(_learnable(row_to_messages(row, voice)), path.parent), allowed, decode)
        except (ValueError, OSError) as error:
            yield number, str(error)
    if not number:
        raise ValueError(f"Data file '{path}' holds no rows.")


def _check_row(messages: list[dict], allowed: set[str], decode: bool) -> None:
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise ValueError(f"roles must alternate user, assistant after an optional system message, got {roles}")
    for part in _parts(messages):
        if part.get("type") != "text":
            _check_part(part.get("type"), part, allowed, decode)


def _parts(messages: list[dict]) -> list[Mapping[str, Any]]:
    """All parts of a conversation."""
    contents = (message["content"] for message in messages)
    return [
        part for each in contents for part in ([{"type": "text", "text": each}] if isinstance(each, str) else each)
    ]


def _learnable(messages: list[dict]) -> list[dict]:
    """The same messages, if an answer is among them."""
    answers = _parts([message for message in messages if message.get("role") == "assistant"])
    if not any(part.get("text", "").strip() for part in answers if part.get("type") == "text"):
        raise ValueError("there is no assistant text to learn")
    return messages


def _check_part(kind: Any, part: Mapping[str, Any], allowed: set[str], decode: bool) -> None:
    if kind not in MODALITIES:
        raise ValueError(f"a part has the type {kind!r}; known are text, {', '.join(MODALITIES)}")
    if kind not in allowed:
        raise ValueError(f"it has {kind}, for which the model has no tower")
    sources = [part[key] for key in (kind, *SOURCE_KEYS) if part.get(key) is not None]
    if len(sources) != 1:
        raise ValueError(f"a part of type '{kind}' has {len(sources) or 'no'} source{'s' * (len(sources) > 1)}")
    source = sources[0]
    for each in source if isinstance(source, list) and kind == "video" else [source]:
        is_url = str(each).startswith(("http://", "https://", "data:"))
        is_file = isinstance(each, str) and not is_url and "base64" not in part
        if is_file and not Path(each).is_file():
            raise ValueError(f"there is no file '{each}'")
    if decode:
        if kind == "image":
            load_image(source)
        elif kind == "video":
            load_frames(source, len(source) if isinstance(source, list) else 2)
        else:
            check_waveform(load_waveform(source))


__all__ = [
    "UniMoEDataCollator",
    "check_rows",
    "describe_row",
    "row_modalities",
    "row_to_messages",
]
