"""
How far connectors' outputs lie from the text embeddings beside them.

Letters: H hidden.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..hub.configuration_uni_moe import MODALITIES
from ..mixtures.evaluating import evaluating


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class VectorStatistics:
    r"""
    Args:
        count (`int`): Vectors.
        norm_mean, norm_std (`float`): Of their Euclidean norms.
        norm_quantiles (`tuple[float, ...]`): 0, 5, 50, 95 and 100 % quantiles of the norms.
        mean, std (`float`): Of all their components.
    """

    count: int
    norm_mean: float
    norm_std: float
    norm_quantiles: tuple[float, ...]
    mean: float
    std: float


@dataclass(frozen=True)
class ConnectorReport:
    r"""
    Args:
        statistics (`dict[str, VectorStatistics]`): "text" (embeddings), then every modality of the batch.
        max_ratio (`float`): From which factor between median norms on, either way, a modality is off scale.
    """

    statistics: dict[str, VectorStatistics]
    max_ratio: float

    @property
    def ratios(self) -> dict[str, float]:
        """`dict[str, float]`: median norm of each modality over that of text embeddings."""
        text = self.statistics["text"].norm_quantiles[2]
        return {
            modality: found.norm_quantiles[2] / text if text else math.inf
            for modality, found in self.statistics.items()
            if modality != "text"
        }

    @property
    def off_scale(self) -> list[str]:
        """`list[str]`: modalities whose median norm is `max_ratio` times that of text or more, or as much less."""
        return [m for m, ratio in self.ratios.items() if not 1 / self.max_ratio < ratio < self.max_ratio]

    def to_dict(self) -> dict[str, Any]:
        """`dict` of plain numbers and names, ready for JSON."""
        return {
            "statistics": {name: vars(found) for name, found in self.statistics.items()},
            "ratios": self.ratios,
            "off_scale": self.off_scale,
        }

    def __str__(self) -> str:
        lines = [
            f"{'':<8}{'vectors':>9}{'norm':>11}{'+-':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'std':>9}{'/ text':>9}"
        ]
        for name, found in self.statistics.items():
            _, low, median, high, _ = found.norm_quantiles
            numbers = "".join(f"{value:>9.4g}" for value in (found.norm_std, low, median, high, found.std))
            ratio = f"{self.ratios[name]:>9.3g}" if name in self.ratios else f"{'-':>9}"
            flag = "  off scale" if name in self.off_scale else ""
            lines.append(f"{name:<8}{found.count:>9}{found.norm_mean:>11.4g}{numbers}{ratio}{flag}")
        return "\n".join(lines)


@torch.no_grad()
def connector_statistics(model: nn.Module, batch: Mapping[str, Any], max_ratio: float = 10.0) -> ConnectorReport:
    r"""
    Compares what connectors put into the sequence with the text embeddings beside it: a modality that is off scale
    drowns the text, or is drowned by it, and trains badly.

    Args:
        model (`nn.Module`): A Uni-MoE, bare or inside PEFT.
        batch (`dict`): Model inputs as the processor makes them.
        max_ratio (`float`, *optional*, defaults to 10.0): From which factor between the median norms on a modality is
            off scale. Untrained connectors and embeddings differ by less.

    Returns:
        [`ConnectorReport`]; one warning is logged for every modality that is off scale.

    Raises:
        ValueError: the model has no Uni-MoE inside, or the batch holds no media.
    """
    report = statistics_of(sequence_vectors(model, batch), max_ratio)
    statistics = report.statistics
    for modality in report.off_scale:
        logger.warning(
            "The connector's outputs for %s have a median norm of %.3g, text embeddings one of %.3g (factor %.3g); "
            "train the connector (stage 1) or check how its weights were made.",
            modality,
            statistics[modality].norm_quantiles[2],
            statistics["text"].norm_quantiles[2],
            report.ratios[modality],
        )
    return report


def statistics_of(vectors: Mapping[str, torch.Tensor], max_ratio: float = 10.0) -> ConnectorReport:
    """
    Args:
        vectors (`dict[str, torch.Tensor]`): Of [`sequence_vectors`].
        max_ratio (`float`, *optional*, defaults to 10.0): As in [`connector_statistics`].

    Returns:
        [`ConnectorReport`].
    """
    return ConnectorReport({name: _statistics(each) for name, each in vectors.items()}, max_ratio)


@torch.no_grad()
def sequence_vectors(
    model: nn.Module, batch: Mapping[str, Any], encoded: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """
    Args:
        model, batch: As in [`connector_statistics`].
        encoded (`dict`, *optional*): What the model's `encode_media` gave for the batch, where it is at hand.

    Returns:
        `dict[str, torch.Tensor]`: "text" -> embeddings of the batch's words, or of the whole vocabulary where there
        are none; modality -> what its connector gives; each `(n, H)` in float32.

    Raises:
        ValueError: the model has no Uni-MoE inside, or the batch holds no media.
    """
    root = root_of(model)
    if encoded is None:
        accepted = inspect.signature(root.encode_media).parameters
        with evaluating(root):  # dropout would blur the numbers
            encoded = root.encode_media(**{n: batch[n] for n in accepted if batch.get(n) is not None})
    if not encoded:
        raise ValueError(f"The batch holds no media, only {sorted(batch)}; pass pictures, videos, sound or speech.")
    table = root.get_input_embeddings()
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    is_word = (ids < table.num_embeddings) & (True if mask is None else mask.bool())
    for modality in MODALITIES:
        is_word &= ids != getattr(root.config, f"{modality}_token_id")
    words = ids[is_word]
    text = table(words) if len(words) else table(torch.arange(table.num_embeddings, device=ids.device))
    vectors = {"text": text} | {modality: outputs.pooler_output for modality, outputs in encoded.items()}
    return {name: each.detach().float().flatten(0, -2) for name, each in vectors.items()}


@torch.no_grad()
def nearest_words(
    model: nn.Module, tokenizer: Any, vectors: Mapping[str, torch.Tensor], count: int = 10
) -> dict[str, list[tuple[str, float]]]:
    """
    Which words a modality's tokens are closest to, by the cosine with text embeddings.

    Args:
        model (`nn.Module`): A Uni-MoE, bare or inside PEFT.
        tokenizer: Of its LLM.
        vectors (`dict[str, torch.Tensor]`): Of [`sequence_vectors`]; "text" is passed over.
        count (`int`, *optional*, defaults to 10): How many words.

    Returns:
        `dict[str, list[tuple[str, float]]]`: modality -> words, the commonest first, and the share of the modality's
        tokens that have each for their nearest.
    """
    table = root_of(model).get_input_embeddings().weight.detach().float()
    table = table[: min(len(table), len(tokenizer))]
    table = table / table.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    found = {}
    for modality, rows in vectors.items():
        if modality == "text":
            continue
        nearest = torch.cat([(part.to(table.device) @ table.T).argmax(dim=-1) for part in rows.split(1024)])
        ids, times = nearest.unique(return_counts=True)
        order = times.argsort(descending=True)[:count].tolist()
        words = [
            (tokenizer.decode([int(ids[place])]).strip() or repr(tokenizer.decode([int(ids[place])])))
            for place in order
        ]
        found[modality] = [(word, int(times[at]) / len(nearest)) for word, at in zip(words, order, strict=True)]
    return found


def root_of(model: nn.Module) -> nn.Module:
    """The module of a Uni-MoE, bare or inside PEFT, that has its towers, connectors and decoder."""
    root = next((module for module in model.modules() if type(module).__name__ == "UniMoEModel"), None)
    if root is None:
        raise ValueError(f"A {type(model).__name__} holds no Uni-MoE, so there are no connectors to look at.")
    return root


def _statistics(vectors: torch.Tensor) -> VectorStatistics:
    """Of vectors `(n, H)`."""
    norms = vectors.norm(dim=-1)
    points = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], device=norms.device)
    return VectorStatistics(
        count=len(vectors),
        norm_mean=norms.mean().item(),
        norm_std=norms.std(correction=0).item(),
        norm_quantiles=tuple(norms.quantile(points).tolist()),
        mean=vectors.mean().item(),
        std=vectors.std(correction=0).item(),
    )


__all__ = ["ConnectorReport", "connector_statistics", "nearest_words", "root_of", "sequence_vectors", "statistics_of"]
