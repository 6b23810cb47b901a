"""
From data set rows to training batches: rows of either format become messages, messages become tensors and labels.

Rows keep paths; media are read when a batch is made. Rows with different modalities, or none, mix freely.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from .processing_uni_moe import MODALITIES, UniMoEProcessor


logger = logging.get_logger(__name__)


class UniMoEDataCollator:
    r"""
    Makes a training batch of rows with any mix of modalities. Only what the assistant says is learned.

    Args:
        processor ([`UniMoEProcessor`]): Of the model.
        max_length (`int`, *optional*): Longest row in tokens, media included. A longer row loses its end, unless media
            would be cut: then the row is skipped.
        skip_unreadable (`bool`, *optional*, defaults to `False`): Whether rows that cannot be processed are skipped and
            counted instead of stopping the training.
        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.

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
    ):
        self.processor = processor
        self.max_length = max_length
        self.skip_unreadable = skip_unreadable
        self.voice = voice
        self.skipped: Counter[str] = Counter()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`): Each with `messages`, or in the original format (see [`row_to_messages`]).

        Returns:
            Model inputs as [`UniMoEProcessor.__call__`] makes them, with `labels` `(B, T)`, -100 where nothing is learned.

        Raises:
            ValueError: a row cannot be processed (unless `skip_unreadable`), or no row of the batch is left.
        """
        readable = [row_to_messages(row, self.voice) for row in rows]
        try:
            batch = self._encode(readable)
        except ValueError:
            if not self.skip_unreadable:
                raise
            readable = [messages for messages in readable if self._is_readable(messages)]
            batch = self._encode(readable) if readable else {}
        if readable and self.max_length is not None:
            batch = self._shortened(readable, batch)
        if not batch:
            raise ValueError(f"No row of this batch of {len(rows)} can be used: {dict(self.skipped)}.")
        return batch

    def _encode(self, conversations: list[list[dict]]) -> dict[str, Any]:
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return dict(batch)

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
        placeholders = [getattr(self.processor, f"{modality}_token_id") for modality in MODALITIES]
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
    for turn in row["conversations"]:
        parts = []
        for piece in re.split(r"\n?(<image>|<audio>|<video>)\n?", turn["value"]):
            if piece in kinds:
                used[piece] += 1
                parts.append({"type": kinds[piece], kinds[piece]: next(queues[piece], None)})
            elif piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": parts})
    for placeholder, names in files.items():
        if used[placeholder] != len(names):
            raise ValueError(
                f"A row has {used[placeholder]} {placeholder} in its conversation but {len(names)} such files; "
                "they must be as many."
            )
    return messages


__all__ = ["UniMoEDataCollator", "row_to_messages"]
