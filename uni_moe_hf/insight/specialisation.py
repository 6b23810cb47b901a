"""
How far experts are specialised: mutual information with what they get, and what the model loses without them.

Letters: R rows, L sparse layers, M token types or kinds of rows, E experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import answer_losses
from ..evaluation.statistics import LEVEL, Figure, mean_of
from ..mixtures.expert_adapters import expert_names
from ..mixtures.progress import progress_bar
from ..mixtures.routing import mutual_information, routers_of
from .routing_tables import RoutingTables


RESAMPLES = 200  # of rows, for an interval
SHUFFLES = 50
FEW_ROWS = 8  # below this an interval would be made of too few rows


@dataclass(frozen=True)
class Information:
    r"""
    Mutual information of the expert that is chosen and what is chosen for, in nats.

    Args:
        value (`Figure`): Measured, with the interval of a bootstrap over rows.
        shuffled (`float`): Its mean where labels are shuffled: what so small a sample gives by chance.
        shuffled_high (`float`): Its 97.5 % quantile.
        bound (`float`): Its largest possible value: the entropy of the labels, or the logarithm of E if that is less.
    """

    value: Figure
    shuffled: float
    shuffled_high: float
    bound: float

    @property
    def share(self) -> float:
        """`float`: of the bound, chance taken off; 0 where nothing is to be known."""
        room = self.bound - self.shuffled
        return max(0.0, (self.value.value - self.shuffled) / room) if room > 1e-9 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "value": self.value.to_dict(),
            "shuffled": self.shuffled,
            "shuffled_high": self.shuffled_high,
            "bound": self.bound,
            "share_of_bound": self.share,
        }


def information_of_types(tables: RoutingTables, seed: int = 0) -> list[Information]:
    """
    Of the expert and the type of the token: text, picture, video, sound, speech. Every choice counts once.

    Args:
        tables ([`RoutingTables`]): Of at least `FEW_ROWS` rows.
        seed (`int`, *optional*, defaults to 0): Of resampling and shuffling.

    Returns:
        `list[Information]`: of each layer. Shuffled are tokens.

    Raises:
        ValueError: there are too few rows for an interval.
    """
    _check_rows(tables)
    per_row = tables.counts[:, :, tables.present].astype(float)  # (R, L, M, E)

    def shuffled(generator: np.random.Generator) -> np.ndarray:
        return np.stack([_shuffled_table(table, generator) for table in per_row.sum(axis=0)])

    return _information(per_row, shuffled, tables, seed)


def information_of_rows(tables: RoutingTables, seed: int = 0) -> list[Information]:
    """
    Of the expert and what is in the row, "image+speech" for one: words about a picture count as the picture's.

    Args:
        tables ([`RoutingTables`]): Of at least `FEW_ROWS` rows.
        seed (`int`, *optional*, defaults to 0): Of resampling and shuffling.

    Returns:
        `list[Information]`: of each layer. Shuffled are whole rows, as tokens of a row go together.

    Raises:
        ValueError: there are too few rows for an interval.
    """
    _check_rows(tables)
    names = sorted(set(tables.kinds))
    labels = np.array([names.index(kind) for kind in tables.kinds])
    of_row = tables.counts.sum(axis=2).astype(float)  # (R, L, E)

    def table(labels: np.ndarray) -> np.ndarray:
        made = np.zeros((len(of_row), of_row.shape[1], len(names), of_row.shape[2]))
        made[np.arange(len(of_row)), :, labels] = of_row
        return made

    def shuffled(generator: np.random.Generator) -> np.ndarray:
        return table(generator.permutation(labels)).sum(axis=0)

    return _information(table(labels), shuffled, tables, seed)


def _check_rows(tables: RoutingTables) -> None:
    if len(tables.kinds) < FEW_ROWS:
        raise ValueError(f"An interval needs {FEW_ROWS} rows or more, and there are {len(tables.kinds)}; give more.")


def _information(
    per_row: np.ndarray,
    shuffled: Callable[[np.random.Generator], np.ndarray],
    tables: RoutingTables,
    seed: int,
) -> list[Information]:
    generator = np.random.default_rng(seed)
    rows = len(per_row)
    total = per_row.sum(axis=0)  # (L, M, E)
    values = mutual_information(total)  # (L,)
    chance = np.stack([mutual_information(shuffled(generator)) for _ in range(SHUFFLES)])  # (S, L)
    weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(float)  # (D, R)
    drawn = np.stack([mutual_information(np.tensordot(weight, per_row, axes=(0, 0))) for weight in weights])  # (D, L)
    shares = total.sum(axis=-1) / np.maximum(total.sum(axis=(-2, -1))[:, None], 1)  # (L, M)
    entropies = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=-1)
    found = []
    for layer, value in enumerate(values):
        low, high = np.quantile(drawn[:, layer], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        figure = Figure(float(value), float(min(low, value)), float(max(high, value)), rows, "")
        found.append(
            Information(
                figure,
                float(chance[:, layer].mean()),
                float(np.quantile(chance[:, layer], (1 + LEVEL) / 2)),
                float(min(entropies[layer], math.log(len(tables.expert_names)))),
            )
        )
    return found


def _shuffled_table(table: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random table `(M, E)` with the same margins."""
    left, made = table.sum(axis=0).astype(np.int64), []
    for total in table.sum(axis=1).astype(np.int64):
        drawn = generator.multivariate_hypergeometric(left, total, method="marginals")
        made.append(drawn)
        left = left - drawn
    return np.array(made, dtype=float)


@contextmanager
def without_expert(model: nn.Module, name: str) -> Iterator[None]:
    r"""
    Takes an expert out of every layer meanwhile: routers choose among the others, whose weights sum to 1.

    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers, bare or inside PEFT, quantised or not.
        name (`str`): The expert, or its number where experts have no names.

    Raises:
        ValueError: there is no such expert, or no other.
    """
    root, routers = routers_of(model)
    config = root.config.get_text_config()
    names = expert_names(config)
    if name not in names:
        raise ValueError(f"There is no expert '{name}'; the model has {', '.join(names)}.")
    if len(names) == 1:
        raise ValueError(f"'{name}' is the only expert, so nothing is left without it.")
    expert = names.index(name)

    def choose_again(_: nn.Module, __: tuple, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = output
        rest = logits.clone()
        rest[:, expert] = -math.inf
        top, again = torch.topk(rest, chosen.shape[1], dim=-1)
        return logits, torch.softmax(top, dim=-1, dtype=weights.dtype), again

    handles = [router.register_forward_hook(choose_again) for _, router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def knock_out(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], tables: RoutingTables, experts: Sequence[str] | None = None
) -> dict[str, dict[str, Figure]]:
    r"""
    How much the loss of answers rises without each expert.

    Args:
        model (`nn.Module`): In evaluation mode.
        batches (`Sequence[dict]`): Model inputs with `labels`, those of which `tables` are made.
        tables ([`RoutingTables`]): Of the whole model, whose losses are the base.
        experts (`Sequence[str]`, *optional*): Which to take out; all by default.

    Returns:
        `dict[str, dict[str, Figure]]`: expert -> kind of rows -> rise in nats, the mean of paired differences with its
        bootstrap interval. An expert that no token chose gives 0.

    Raises:
        ValueError: an unknown expert, or the only one.
    """
    experts = tables.expert_names if experts is None else experts
    kinds, base = np.array(tables.kinds), tables.losses
    known = ~np.isnan(base)
    found: dict[str, dict[str, Figure]] = {}
    for name in progress_bar(experts, desc="without each expert", unit="expert"):
        with without_expert(model, name):
            losses = np.array([loss for batch in batches for loss in answer_losses(model, dict(batch))[0]])
        rises = losses - base
        found[name] = {
            kind: mean_of(rises[(kinds == kind) & known], unit="").figure() for kind in dict.fromkeys(tables.kinds)
        }
    return found


__all__ = [
    "FEW_ROWS",
    "Information",
    "information_of_rows",
    "information_of_types",
    "knock_out",
    "without_expert",
]
