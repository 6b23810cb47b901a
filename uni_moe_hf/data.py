"""
From data set rows to training batches: rows of either format become messages, messages become tensors and labels.

Rows keep paths; media are read when a batch is made. Rows with different modalities, or none, mix freely.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .processing_uni_moe import UniMoEProcessor


logger = logging.get_logger(__name__)


class UniMoEDataCollator:
    r"""
    Makes a training batch of rows with any mix of modalities. Only what the assistant says is learned.

    Args:
        processor ([`UniMoEProcessor`]): Of the model.
        max_length (`int`, *optional*): Longest row in tokens, media included. A longer row loses its end, unless media
            would be cut: then the row is skipped.
        skip_unreadable (`bool`, *optional*, defaults to `False`): Whether rows that cannot be processed are skipped
            and counted instead of stopping the training.
        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.
        media_root (`str` or `Path`, *optional*): Folder that relative paths start from; else the working directory.

    Attributes:
        skipped (`Counter`): Why rows were skipped, and how often, in this process.

    Source: labels as in `*/train/data.py@f5e82dd`: the answer and its `</s>`.
    """

    def __init__(
        self,
        processor: UniMoEProcessor,
        max_length: int | None = None,
        skip_unreadable: bool = False,
        voice: str = "speech",
        media_root: str | Path | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.skip_unreadable = skip_unreadable
        self.voice = voice
        self.media_root = None if media_root is None else Path(media_root)
        self.skipped: Counter[str] = Counter()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`): Each with `messages`, or in the original format (see [`row_to_messages`]).

        Returns:
            Model inputs as [`UniMoEProcessor.__call__`] makes them, with `labels` `(B, T)`, -100 where nothing is
            learned.

        Raises:
            ValueError: a row cannot be processed (unless `skip_unreadable`), or no row of the batch is left.
        """
        readable = [messages for messages in map(self._messages, rows) if messages]
        try:
            batch = self._encode(readable) if readable else {}
        except ValueError:
            if not self.skip_unreadable:
                raise
            readable = [messages for messages in readable if self._is_readable(messages)]
            batch = self._encode(readable) if readable else {}
        if batch and self.max_length is not None:
            batch = self._shortened(readable, batch)
        if not batch:
            raise ValueError(f"No row of this batch of {len(rows)} can be used: {dict(self.skipped)}.")
        return batch

    def _messages(self, row: Mapping[str, Any]) -> list[dict] | None:
        """A row as messages with rooted paths; `None` when it is skipped."""
        try:
            return self._rooted(row_to_messages(row, self.voice))
        except ValueError as error:
            if not self.skip_unreadable:
                raise
            self._skip("unreadable", error)
            return None

    def _rooted(self, messages: list[dict]) -> list[dict]:
        """The same messages, relative paths joined to `media_root`."""

        def rooted(value: Any) -> Any:
            if isinstance(value, list):  # a video as a list of frames
                return [rooted(item) for item in value]
            if isinstance(value, Mapping):
                return {**value, "path": rooted(value.get("path"))}
            is_path = isinstance(value, str | Path) and not str(value).startswith(("http://", "https://", "data:"))
            return str(self.media_root / value) if is_path else value

        def rooted_part(part: Any) -> Any:
            if not isinstance(part, Mapping) or part.get("type") == "text":
                return part
            keys = (part.get("type"), "path")
            return {key: rooted(value) if key in keys else value for key, value in part.items()}

        if self.media_root is None:
            return messages
        return [
            message
            if isinstance(message.get("content"), str | None)
            else {**message, "content": [rooted_part(part) for part in message["content"]]}
            for message in messages
        ]

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
        if not (silent := (labels != -100).any(dim=1)).all():
            raise ValueError(
                f"Row {int((~silent).nonzero()[0])} of a batch of {len(conversations)} has no assistant text to "
                "learn; remove it, or check that the chat template marks answers with `generation`."
            )
        return {**batch, "labels": labels}

    @property
    def _placeholder_ids(self) -> list[int]:
        return [getattr(self.processor, f"{modality}_token_id") for modality in MODALITIES]

    def _is_readable(self, messages: list[dict]) -> bool:
        try:
            self._encode([messages])
        except ValueError as error:
            self._skip("unreadable", error)
            return False
        return True

    def _shortened(self, conversations: list[list[dict]], batch: dict[str, Any]) -> dict[str, Any]:
        """Rows cut to `max_length`, without those whose media or whole answer lie behind it."""
        if batch["input_ids"].shape[1] <= self.max_length:
            return batch
        placeholders = self._placeholder_ids
        kept = []
        for row, messages in enumerate(conversations):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            if any(token in placeholders for token in ids[self.max_length :].tolist()):
                self._skip("media beyond max_length", f"{int(batch['attention_mask'][row].sum())} tokens")
            elif not (labels[: self.max_length] != -100).any():
                self._skip("answer beyond max_length", f"{int(batch['attention_mask'][row].sum())} tokens")
            else:
                kept.append(messages)
        if len(kept) < len(conversations):
            batch = self._encode(kept) if kept else {}
        per_token = ("input_ids", "attention_mask", "labels")
        return {key: value[:, : self.max_length] if key in per_token else value for key, value in batch.items()}

    def _skip(self, reason: str, detail: Any) -> None:
        self.skipped[reason] += 1
        logger.warning("Skipped a row (%s: %s); %d skipped so far.", reason, detail, self.skipped.total())


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
        return [dict(message) for message in row["messages"]]
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


def load_rows(source: str | Path, split: str = "train") -> Any:
    r"""
    Args:
        source (`str` or `Path`): A `.json` (one list) or `.jsonl` file of rows in either format, or a data set that
            `datasets.load_dataset` finds.
        split (`str`, *optional*, defaults to `"train"`): Split of such a data set.

    Returns:
        `datasets.Dataset`. Media stay paths: nothing is decoded.

    Raises:
        ValueError: the file is no JSON list or lines of objects.
        ImportError: `datasets` is needed and missing.
    """
    try:
        from datasets import Dataset, load_dataset
    except ImportError as error:
        raise ImportError("Loading rows needs `datasets`: `pip install uni-moe-hf[train]`.") from error
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        return load_dataset(str(source), split=split)
    if not path.is_file():
        raise ValueError(f"Data file '{path}' does not exist; check the path.")
    text = path.read_text(encoding="utf-8")
    try:
        # Not `splitlines`, which also breaks at characters that JSON strings may hold.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"Data file '{path}' is no valid {path.suffix[1:]} ({error}).") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"Data file '{path}' must hold a non-empty list of objects, one per row.")
    # Columns are those of the first row, so every row gets all. Parts have other keys for each modality; a common
    # schema would fill every part with all of them.
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Dataset.from_list([{key: row.get(key) for key in columns} for row in rows], on_mixed_types="use_json")


__all__ = ["UniMoEDataCollator", "load_rows", "row_to_messages"]
