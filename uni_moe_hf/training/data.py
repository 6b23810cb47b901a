"""
From data set rows to training batches: messages become tensors and labels.

Rows keep paths; media are read when a batch is made. Rows with different modalities, or none, mix freely.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.files_uni_moe import reason
from ..hub.processing_uni_moe import UniMoEProcessor
from .feature_cache import FeatureCacheError
from .rows import describe_row, parts_of, rooted, row_to_messages, unread_fields


logger = logging.get_logger(__name__)

# What stands where every row of a batch was skipped, and how many such batches may follow each other.
NO_ROW = "an empty row in place of"
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
        needs_answers (`bool`, *optional*, defaults to `True`): Whether rows without an answer are bad; else nothing of
            them is learned, for whom looks at what a model makes of questions.

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
        needs_answers: bool = True,
    ):
        self.processor = processor
        self.max_length = max_length
        self.skip_bad_rows = skip_bad_rows
        self.voice = voice
        self.media_root = None if media_root is None else Path(media_root)
        self.describe_rows = describe_rows
        self.needs_answers = needs_answers
        self.skipped: Counter[str] = Counter()
        self._barren = 0  # batches in succession of which nothing could be used

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`): In any form of [`row_to_messages`].

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
        except Exception as error:
            if isinstance(error, FeatureCacheError) and not self.skip_bad_rows:
                raise
            named = [(name, messages) for name, messages in named if self._is_readable(name, messages)]
            batch = self._encode([messages for _, messages in named]) if named else {}
        if batch and self.max_length is not None:
            batch = self._shortened(named, batch)
        self._barren = 0 if batch else self._barren + 1
        if self._barren > MAX_BARREN:
            raise ValueError(f"No row of the last {MAX_BARREN} batches could be used: {dict(self.skipped)}.")
        skipped = len(rows) - len(named)
        if not batch:
            named = [(f"{NO_ROW} {len(rows)} that were skipped", EMPTY_ROW)]
            batch = self._encode([EMPTY_ROW], learned=False)
        if self.describe_rows:
            batch |= {"rows": [name for name, _ in named], "num_skipped": skipped}
        return batch

    def clips(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """
        Args:
            row (`dict`): In any form of [`row_to_messages`].

        Returns:
            `list[tuple]`: modality, as the model perceives it, and source of each clip, in reading order; empty for a
            row that is skipped.

        Raises:
            ValueError: as [`__call__`], for what can be said before media are read.
        """
        if not (messages := self._messages(row)):
            return []
        conversations, _ = self.processor._conversations([messages], self.processor._template(None))
        parts = [part for message in conversations[0] for part in message["content"] if part["type"] != "text"]
        return [(self.processor._ear(part["type"]), part["source"]) for part in parts]

    def _messages(self, row: Mapping[str, Any]) -> list[dict] | None:
        """A row as messages with rooted paths; `None` when it is skipped."""
        root = self.media_root or row.get("_root")
        try:
            for name in unread_fields(row):
                logger.warning_once(f"Rows have the field '{name}', of which nothing is made.")
            messages = row_to_messages(row, self.voice)
            return rooted(
                learnable(messages) if self.needs_answers else messages, None if root is None else Path(root)
            )
        except Exception as error:  # whatever a row can cause is counted for that row
            self._refuse(describe_row(row), error)
            return None

    def _encode(self, conversations: list[list[dict]], learned: bool = True) -> dict[str, Any]:
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        for token_id in self._placeholder_ids:  # media in an answer are shown, not learned
            labels = labels.masked_fill(labels == token_id, -100)
        if not learned:
            labels = labels.fill_(-100)
        elif self.needs_answers and not (labels != -100).any(dim=1).all():
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
        except ImportError:
            raise
        except FeatureCacheError:
            # What cannot be read is in no cache: a fault of the row.
            cache, self.processor.feature_cache = self.processor.feature_cache, None
            try:
                if self._is_readable(name, messages):
                    raise
            finally:
                self.processor.feature_cache = cache
            return False
        except Exception as error:
            self._refuse(name, error)
            return False
        return True

    def _refuse(self, name: str, error: Exception) -> None:
        """Skips a row, or stops."""
        if not self.skip_bad_rows:
            raise ValueError(f"{name} cannot be used: {reason(error)}") from error
        self._skip("unreadable", f"{name}: {reason(error)}")

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


def learnable(messages: list[dict]) -> list[dict]:
    """
    Args:
        messages (`list[dict]`): A conversation.

    Returns:
        `list[dict]`: the same.

    Raises:
        ValueError: no answer is among them.
    """
    answers = parts_of([message for message in messages if message.get("role") == "assistant"])
    if not any(part.get("text", "").strip() for part in answers if part.get("type", "text") == "text"):
        raise ValueError("there is no assistant text to learn")
    return messages


__all__ = ["UniMoEDataCollator", "learnable"]
