"""Filling a feature cache from rows, before training: each clip is run through its tower once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..hub.files_uni_moe import reason
from ..mixtures.progress import progress_bar
from .data import UniMoEDataCollator
from .feature_cache import FeatureCache, parts_of
from .rows import describe_row


BATCHES_AT_ONCE = 64  # whose clips are in memory while rows are read


@dataclass
class Encoded:
    """
    What became of the clips of one modality.

    Args:
        clips (`int`): In the rows.
        known (`int`): Of these stored before, or copies of another.
        new (`int`): Encoded now; in a dry run, that would be.
        bytes (`int`): Of the features of the new ones.
    """

    clips: int = 0
    known: int = 0
    new: int = 0
    bytes: int = 0


@dataclass
class Encoding:
    """
    What became of the clips of some rows.

    Args:
        modalities (`dict[str, Encoded]`): Of each modality.
        refused (`list[str]`): Rows and clips that cannot be read, and why.
    """

    modalities: dict[str, Encoded] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    model: nn.Module,
    collator: UniMoEDataCollator,
    cache: FeatureCache,
    batch_size: int = 8,
    num_workers: int = 0,
    dry_run: bool = False,
    num_rows: int | None = None,
) -> Encoding:
    r"""
    Stores the features of all clips of some rows. What is stored already is passed over, so a call that was
    interrupted is repeated and goes on.

    Args:
        rows (`Iterable[dict]`): In any form of [`row_to_messages`].
        model ([`UniMoEForConditionalGeneration`]): With its towers.
        collator ([`UniMoEDataCollator`]): That the rows are trained with.
        cache ([`FeatureCache`]): Made with `fill=True` for this model and the collator's processor.
        batch_size (`int`, *optional*, defaults to 8): Clips that are read together.
        num_workers (`int`, *optional*, defaults to 0): Processes that read media.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to say only what it would come to. Media are read,
            but towers run on one batch of each modality alone, and nothing is stored.
        num_rows (`int`, *optional*): How many rows there are, for the estimate of the progress bar.

    Returns:
        [`Encoding`].

    Raises:
        OSError: the disk is full; what was stored before is kept.
    """
    found, processor, bytes_of_unit, before_this = Encoding(), collator.processor, {}, cache.added.copy()
    before, processor.feature_cache = processor.feature_cache, cache
    rows = progress_bar(rows, total=num_rows, desc="encoding", unit="row")
    try:
        with cache.collecting(dry_run):
            for modality, clips in _missing(rows, collator, cache, found, BATCHES_AT_ONCE * batch_size):
                counts = found.modalities[modality]
                for batch, count, refused in _batches(processor, modality, clips, batch_size, num_workers):
                    found.refused += refused
                    if batch is None:
                        continue
                    # None where another process has stored them meanwhile.
                    new = batch.get("clips_to_store", {}).get(modality, [])
                    units = [units for _, units in new]
                    counts.new += len(new)
                    counts.known += count - len(new)
                    batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                    if not dry_run:
                        cache.store(model, batch)
                    elif modality not in bytes_of_unit and new:
                        states = cache.states_of(model, batch)
                        kept = [each for tensors in parts_of(modality, units, states) for each in tensors.values()]
                        bytes_of_unit[modality] = sum(tensor.nbytes for tensor in kept) / sum(units)
                    counts.bytes += round(bytes_of_unit.get(modality, 0) * sum(units))
    finally:
        processor.feature_cache = before
        cache.flush()  # also where it is interrupted
    if not dry_run:
        for modality, counts in found.modalities.items():
            counts.bytes = cache.added[modality] - before_this[modality]
    return found


def _missing(
    rows: Iterable[Mapping[str, Any]],
    collator: UniMoEDataCollator,
    cache: FeatureCache,
    found: Encoding,
    at_once: int,
) -> Iterator[tuple[str, list[Any]]]:
    """Clips that are to be encoded: a modality and at most `at_once` of its clips, which may hold whole films."""
    missing: dict[str, list[Any]] = {}
    seen: set[str] = set()
    for row in rows:
        try:
            for modality, source in collator.clips(row):
                key = cache.key_of(collator.processor, modality, source, {})
                counts = found.modalities.setdefault(modality, Encoded())
                counts.clips += 1
                if key.key in seen or cache.has([key]):
                    counts.known += 1
                else:
                    seen.add(key.key)
                    missing.setdefault(modality, []).append(source)
        except (ValueError, OSError) as error:
            name, why = describe_row(row), reason(error)
            found.refused.append(why if why.startswith(name) else f"{name}: {why}")
        for modality in [modality for modality, clips in missing.items() if len(clips) >= at_once]:
            yield modality, missing.pop(modality)
    yield from missing.items()


class _Reader(Dataset):
    """Clips, a batch at a time, as the towers take them."""

    def __init__(self, processor: Any, modality: str, batches: list[list[Any]]):
        self.processor, self.modality, self.batches = processor, modality, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, int, list[str]]:
        readable, refused = self.batches[index], []
        try:
            return self._read(readable), len(readable), refused
        except ValueError:
            readable = [source for source in readable if self._is_readable(source, refused)]
            return (self._read(readable) if readable else None), len(readable), refused

    def _read(self, sources: list[Any]) -> dict[str, Any]:
        processor = self.processor
        data, _ = processor._features({self.modality: sources}, processor._grouped_kwargs({}))
        return {name: v if isinstance(v, dict) else torch.as_tensor(v) for name, v in data.items()}

    def _is_readable(self, source: Any, refused: list[str]) -> bool:
        try:
            self._read([source])
        except ValueError as error:
            refused.append(reason(error))
            return False
        return True


def _batches(
    processor: Any, modality: str, clips: list[Any], batch_size: int, num_workers: int
) -> Iterator[tuple[dict[str, Any] | None, int, list[str]]]:
    """Batches of clips, how many, read by other processes where there are some, and which cannot be read."""
    batches = [clips[start : start + batch_size] for start in range(0, len(clips), batch_size)]
    return iter(DataLoader(_Reader(processor, modality, batches), batch_size=None, num_workers=num_workers))


__all__ = ["Encoded", "Encoding", "encode_rows"]
