"""A picture of what rows hold: some clips of every modality, with what is asked and answered."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.media_uni_moe import Clip, load_frames, load_image, load_waveform
from ..training.rows import parts_of, rooted, row_to_messages
from . import figures


COLUMNS = 6
NAMES = {"image": "pictures", "video": "videos, three frames", "audio": "sounds", "speech": "speech"}
WINDOW, STEP = 400, 160  # samples at 16 kHz: 25 ms every 10 ms


def contact_sheet(
    rows: Iterable[Mapping[str, Any]], file: str | Path, per_modality: int = 12, voice: str = "speech"
) -> dict[str, int]:
    r"""
    Args:
        rows (`Iterable[dict]`): In any form of [`row_to_messages`]; those that cannot be read are passed over.
        file (`str` or `Path`): PNG file to write.
        per_modality (`int`, *optional*, defaults to 12): Clips that are shown of each modality.

        voice (`str`, *optional*, defaults to `"speech"`): What the original format's `voice` files are.

    Returns:
        `dict[str, int]`: modality -> clips shown.

    Raises:
        ValueError: no row holds a clip that can be read, or `per_modality` is not positive.
        ImportError: matplotlib is needed and missing.
    """
    figures.figure_module()
    if per_modality < 1:
        raise ValueError(f"`per_modality` is {per_modality}; show 1 clip or more.")
    shown: dict[str, list[tuple[np.ndarray, str]]] = {}
    for row in rows:
        try:
            for modality, source, text in _clips(row, voice):
                if len(shown.setdefault(modality, [])) < per_modality:
                    shown[modality].append((_seen(modality, source), text))
        except (ValueError, OSError):  # `check_rows` names it
            continue
        if len(shown) == len(MODALITIES) and all(len(each) == per_modality for each in shown.values()):
            break
    shown = {modality: shown[modality] for modality in MODALITIES if shown.get(modality)}
    if not shown:
        raise ValueError("No row holds a clip that can be read, so there is nothing to show.")
    figures.write_png(_draw(shown), Path(file))
    return {modality: len(clips) for modality, clips in shown.items()}


def _clips(row: Mapping[str, Any], voice: str) -> list[tuple[str, Any, str]]:
    """Modality, source and text of each clip of a row."""
    root = row.get("_root")
    messages = rooted(row_to_messages(row, voice), None if root is None else Path(root))
    answers = [message for message in messages if message.get("role") == "assistant"]
    answer = " ".join(part.get("text", "") for part in parts_of(answers)).strip()
    asked = [message for message in messages if message.get("role") == "user"]
    question = " ".join(part.get("text", "") for part in parts_of(asked) if part.get("type") == "text").strip()
    text = "\n".join(line if len(line) < 27 else f"{line[:25]}\u2026" for line in (question, answer))
    found = []
    for part in parts_of(messages):
        modality = part.get("type")
        if modality in MODALITIES:
            source = next((part[key] for key in (modality, "path", "url") if part.get(key) is not None), None)
            found.append((modality, source, text))
    return found


def _seen(modality: str, source: Any) -> np.ndarray:
    """A clip as pixels `(height, width, 3)`, or of sound its spectrogram `(bands, frames)`."""
    if modality == "image":
        return np.asarray(_small(load_image(source)))
    if modality == "video":
        frames = [np.asarray(_small(frame, 120)) for frame in load_frames(source, 3)]
        return np.concatenate([np.pad(f, ((0, 0), (0, 4), (0, 0)), constant_values=255) for f in frames], axis=1)
    wave = load_waveform(Clip(source))[: 30 * 16000]
    wave = np.pad(wave, (0, max(0, WINDOW - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::STEP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)[:, :120]) ** 2  # up to 4.8 kHz
    return np.log10(power + 1e-6).T


def _small(picture: Any, side: int = 240) -> Any:
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def _draw(shown: Mapping[str, list[tuple[np.ndarray, str]]]) -> Any:
    lines = {modality: -(-len(clips) // COLUMNS) for modality, clips in shown.items()}
    with figures.style():
        figure = figures.new(11.0, 0.4 + 1.75 * sum(lines.values()))
        parts = figure.subfigures(len(shown), 1, height_ratios=list(lines.values()))
        for part, (modality, clips) in zip(np.atleast_1d(parts), shown.items(), strict=True):
            part.suptitle(NAMES[modality], x=0.01, ha="left", fontsize=10, fontweight="bold")
            for place, axis in enumerate(part.subplots(lines[modality], COLUMNS).flat):
                axis.set_axis_off()
                if place < len(clips):
                    values, text = clips[place]
                    if values.ndim == 3:
                        axis.imshow(values)
                    else:
                        axis.imshow(values, aspect="auto", origin="lower", cmap="magma")
                    axis.set_title(text, fontsize=7, loc="left")
    return figure


__all__ = ["contact_sheet"]
