"""Rows looked at before training: which cannot be used and why, and what the others hold."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.conversations_uni_moe import ConversationMixin
from ..hub.files_uni_moe import reason, resolved
from ..hub.media_uni_moe import MAX_VIDEO_FRAMES, Clip, iter_frames, load_image, load_waveform
from ..hub.templates_uni_moe import VICUNA_CHAT_TEMPLATE
from .data import learnable
from .row_files import iter_rows
from .rows import parts_of, rooted, row_to_messages, unread_fields


SAMPLING_RATE = 16000


class HeldClip(NamedTuple):
    """A clip of a row: its modality, its source, and its size in pixels or seconds, where it was decoded."""

    modality: str
    source: Any
    measure: tuple[int, int] | float | None


@dataclass
class Found:
    """
    The clips of one modality in the rows that can be used.

    Args:
        rows, clips (`int`): Rows that hold any, and how many they hold.
        files (`set[str]`): Different files among them.
        sizes (`list[tuple[int, int]]`): Width and height of pictures and frames, in pixels.
        seconds (`list[float]`): Length of sound and speech.
        answers (`Counter[str]`): What is answered in their rows.
    """

    rows: int = 0
    clips: int = 0
    files: set[str] = field(default_factory=set)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)


def check_rows(
    source: Any,
    modalities: Iterable[str] = MODALITIES,
    voice: str = "speech",
    decode: bool = True,
    unread: Counter[str] | None = None,
    kinds: Counter[str] | None = None,
    found: dict[str, Found] | None = None,
    media_root: str | Path | None = None,
    **reading: Any,
) -> Iterator[tuple[int, str]]:
    r"""
    Looks for rows that training could not use.

    Args:
        source: As in [`~row_files.load_rows`].
        modalities (`Iterable[str]`, *optional*): What the model has towers for; all by default.
        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.
        decode (`bool`, *optional*, defaults to `True`): Whether media are decoded, and not only looked for.
        unread (`Counter`, *optional*): Gets the fields that nothing is made of, and in how many rows they stand.
        kinds (`Counter`, *optional*): Gets how many of the rows that can be used hold which modalities.
        found (`dict[str, Found]`, *optional*): Gets what the rows that can be used hold of each modality.
        media_root (`str` or `Path`, *optional*): Folder that relative paths start from; else that of the file.
        reading: `split`, `config`, `columns` and `question` as in [`~row_files.load_rows`].

    Yields:
        `tuple(int, str)`: number of a row, from 1, and why it cannot be used.

    Raises:
        ValueError: the source itself cannot be read.
    """
    allowed = {modalities} if isinstance(modalities, str) else set(modalities)
    for row in iter_rows(source, **reading):
        try:
            if unread is not None:
                unread.update(unread_fields(row))
            root = media_root or row.get("_root")
            messages = rooted(learnable(row_to_messages(row, voice)), None if root is None else Path(root))
            clips, answer = check_messages(messages, allowed, decode)
            present = {clip.modality for clip in clips}
            held = [modality for modality in MODALITIES if modality in present]
            if kinds is not None:
                kinds["+".join(held) or "text"] += 1
            if found is not None:
                _count(found, clips, answer)
        except Exception as error:  # whatever a row can cause is said of that row
            several = f"'{row['_source']}': " if isinstance(source, list | tuple | Mapping) else ""
            yield row["_row"], several + reason(error)


def _count(found: dict[str, Found], clips: list[HeldClip], answer: str) -> None:
    for modality in dict.fromkeys(clip.modality for clip in clips):
        found.setdefault(modality, Found()).rows += 1
        found[modality].answers[answer] += 1
    for modality, source, measure in clips:
        each = found[modality]
        each.clips += 1
        each.files.add(str(getattr(source, "source", source))[:1000])
        if isinstance(measure, tuple):
            each.sizes.append(measure)
        elif measure is not None:
            each.seconds.append(measure)


def check_messages(
    messages: list[dict], allowed: Iterable[str] = MODALITIES, decode: bool = True
) -> tuple[list[HeldClip], str]:
    """
    Args:
        messages (`list[dict]`): A conversation with typed parts, its paths absolute.
        allowed (`Iterable[str]`, *optional*): Modalities that there are towers for; all by default.
        decode (`bool`, *optional*, defaults to `True`): Whether media are decoded, and not only looked for.

    Returns:
        `tuple[list[HeldClip], str]`: its clips, and its last answer.

    Raises:
        ValueError: training could not use it.
    """
    checker = _Checker(set(allowed))
    conversations, _ = checker._conversations([messages], VICUNA_CHAT_TEMPLATE)
    roles = [message["role"] for message in conversations[0]]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != (["user", "assistant"] * len(turns))[turns[0] == "assistant" :][: len(turns)]:
        raise ValueError(f"roles must alternate user, assistant after an optional system message, got {roles}")
    if not any(message["role"] == "assistant" and message["learned"] for message in conversations[0]):
        raise ValueError("there is no assistant text to learn")
    clips = []
    for part in parts_of(conversations[0]):
        if (kind := part["type"]) != "text":
            clips.append(HeldClip(kind, part["source"], _check_part(kind, part["source"], allowed, decode)))
    answer = [message for message in conversations[0] if message["role"] == "assistant"][-1]
    return clips, " ".join(part["text"].strip() for part in answer["content"] if part["type"] == "text")


class _Checker(ConversationMixin):
    """Reads messages as the processor does, without a tokenizer."""

    _control_tokens = re.compile(r"(?!)")

    def __init__(self, allowed: set[str]):
        self.allowed = allowed

    def _ear(self, modality: str) -> str:
        return (
            "speech" if modality == "audio" and "audio" not in self.allowed and "speech" in self.allowed else modality
        )


def _check_part(kind: str, source: Any, allowed: set[str], decode: bool) -> tuple[int, int] | float | None:
    """The size of a picture or of frames, or the seconds of a sound; nothing of what is not decoded."""
    if kind not in allowed:
        raise ValueError(f"it has {kind}, for which the model has no tower")
    if source is None:
        raise ValueError(f"a part of type '{kind}' has no source")
    clip = source if isinstance(source, Clip) else Clip(source)
    if not decode:
        for each in clip.source if isinstance(clip.source, list) and kind == "video" else [clip.source]:
            each = each.get("path") if isinstance(each, Mapping) and not each.get("bytes") else each
            if isinstance(each, str) and not each.startswith(("http://", "https://")):
                resolved(each, {"image": "Picture", "video": "Video"}.get(kind, "Audio"))
        return None
    if kind == "image":
        return load_image(clip.source).size
    if kind == "video":
        frames, size = len(clip.source) if isinstance(clip.source, list) else 2, None
        for frame in iter_frames(clip, min(frames, MAX_VIDEO_FRAMES)):
            size = frame.size
        return size
    return len(load_waveform(clip)) / SAMPLING_RATE


__all__ = ["Found", "HeldClip", "check_messages", "check_rows"]
