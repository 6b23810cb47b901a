"""
Single rows with the expert of every token: over a picture's patches, beneath a spectrogram, in the text.

Letters: L sparse layers, N tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import on_device
from ..hub.configuration_uni_moe import MODALITIES
from ..mixtures.routing import TOKEN_TYPES
from ..training.data import UniMoEDataCollator
from . import figures
from .routing_tables import trace_routing


SHOWN_LAYERS = 3
MAX_CLIPS = 2  # of a modality


@dataclass
class Clip:
    """
    What a tower was given, and its tokens.

    Args:
        modality (`str`): "image", "video", "audio" or "speech".
        values (`np.ndarray`): Pixels `(height, width, 3)` in [0, 1], or a spectrogram `(frames, bands)`.
        experts (`np.ndarray` of shape `(L, N)`): Heaviest expert of each of its tokens, in their order.
        grid (`tuple[int, int]`, *optional*): Rows and columns of a picture's patches; `None` where tokens have no
            place, as those of a Q-Former or of a resampler.
    """

    modality: str
    values: np.ndarray
    experts: np.ndarray
    grid: tuple[int, int] | None = None


@dataclass
class Example:
    """
    One row.

    Args:
        kind (`str`): Its modalities.
        pieces (`list[str]`): Text of each token; placeholders of one clip together.
        experts (`np.ndarray` of shape `(L, pieces)`): The expert of each piece; -1 for clips.
        layers (`tuple[int]`): Numbers of the L layers that are shown.
        expert_names (`tuple[str]`): Of all experts.
        clips (`list[Clip]`): In the order of the modalities.
    """

    kind: str
    pieces: list[str]
    experts: np.ndarray
    layers: tuple[int, ...]
    expert_names: tuple[str, ...]
    clips: list[Clip]

    def figures(self) -> dict[str, Any]:
        """`dict[str, matplotlib.figure.Figure]`: one for each clip."""
        drawn: dict[str, Any] = {}
        for clip in self.clips:
            title = {"image": "picture", "video": "middle frame", "audio": "sound", "speech": "speech"}[clip.modality]
            name = clip.modality if clip.modality not in drawn else f"{clip.modality}-2"
            if clip.grid is None:
                if clip.values.ndim == 3:  # a picture whose tokens have no place
                    continue
                drawn[name] = figures.spectrogram(
                    clip.values, list(clip.experts), self.layers, self.expert_names, title
                )
            else:
                grids = [layer.reshape(clip.grid) for layer in clip.experts]
                drawn[name] = figures.picture(clip.values, grids, self.layers, self.expert_names, title)
        return drawn


def example_of(model: nn.Module, processor: Any, row: Mapping[str, Any]) -> Example:
    """
    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers.
        processor ([`UniMoEProcessor`]): Of the model.
        row (`dict`): In any form of [`row_to_messages`].

    Returns:
        [`Example`] of the first, middle and last sparse layers.

    Raises:
        ValueError, OSError: the row cannot be read.
    """
    batch = UniMoEDataCollator(processor, needs_answers=False)([row])
    tables = trace_routing(model, [on_device(batch, model)])
    count = len(tables.layers)
    places = sorted({0, count // 2, count - 1})[:SHOWN_LAYERS]
    heaviest = tables.heaviest[places]  # (L, N)
    clips = []
    for number, modality in enumerate(MODALITIES, start=1):
        of_modality = heaviest[:, tables.types == number]
        if of_modality.shape[1]:
            clips += _clips(modality, batch, of_modality)
    pieces, experts = _pieces(processor.tokenizer, tables.tokens, tables.types, heaviest)
    layers = tuple(tables.layers[place] for place in places)
    return Example(tables.kinds[0], pieces, experts, layers, tuple(map(figures.short, tables.expert_names)), clips)


def _pieces(
    tokenizer: Any, tokens: np.ndarray, types: np.ndarray, heaviest: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Text of the tokens, a clip's placeholders as one piece."""
    pieces, experts, last = [], [], 0
    for place, kind in enumerate(types.tolist()):
        if kind and kind == last:
            continue
        last = kind
        if kind:
            length = int((np.cumprod(types[place:] == kind)).sum())
            pieces.append(f"<{TOKEN_TYPES[kind]}: {length} tokens>")
            experts.append(np.full(len(heaviest), -1))
        else:
            pieces.append(tokenizer.decode([int(tokens[place])]))
            experts.append(heaviest[:, place])
    return pieces, np.stack(experts, axis=1)


def _clips(modality: str, batch: Mapping[str, Any], experts: np.ndarray) -> list[Clip]:
    """The clips of one modality with their tokens, which they share evenly."""
    name = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_values"}.get(
        modality, "input_features"
    )
    values = batch.get(name)
    if not torch.is_tensor(values) or values.dim() < 3 or experts.shape[1] % len(values):
        return []  # towers of other shapes, such as patches of any number
    each = experts.shape[1] // len(values)
    made = []
    for place, value in enumerate(values[:MAX_CLIPS]):
        mine = experts[:, place * each : (place + 1) * each]
        if modality in ("image", "video"):
            frames = value if value.dim() == 4 else value[None]  # (frames, 3, height, width)
            pixels = frames[len(frames) // 2].permute(1, 2, 0).float().numpy()
            grid = _grid(each)
            if grid is None and each % len(frames) == 0:  # every frame has tokens of its own
                per_frame = each // len(frames)
                grid = _grid(per_frame)
                mine = mine[:, len(frames) // 2 * per_frame :][:, :per_frame]
            low, high = pixels.min(), pixels.max()
            made.append(Clip(modality, (pixels - low) / max(high - low, 1e-6), mine, grid))
        else:
            mel = value.float().numpy()
            made.append(Clip(modality, mel.T if modality == "speech" and mel.ndim == 2 else mel, mine))
    return [clip for clip in made if clip.values.ndim in (2, 3) and (clip.grid or clip.values.ndim == 2)]


def _grid(count: int) -> tuple[int, int] | None:
    """A square of patches."""
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


__all__ = ["Clip", "Example", "example_of"]
