"""Figures with their uncertainty: what rows contribute, what is made of all of them, and bootstrap intervals."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """
    A measured value.

    Args:
        value (`float`): Over all rows.
        low, high (`float`): Ends of the 95 % bootstrap interval. Where all rows agree, which gives the bootstrap no
            width, of the exact binomial one (Clopper and Pearson).
        rows (`int`): Of how many rows it is.
        unit (`str`): `"%"` for a share, 0 to 1, that is printed in per cent; `"points"` for a score that is printed
            times 100, as papers print CIDEr and BLEU; `""` for what is printed as it is.
    """

    value: float
    low: float
    high: float
    rows: int
    unit: str = "%"

    def __str__(self) -> str:
        if self.rows == 0:
            return "of no row"
        if self.value != self.value:
            return "undefined"
        if self.unit == "":
            return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"
        sign = " %" if self.unit == "%" else ""
        return f"{100 * self.value:.1f}{sign} ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Contributions:
    """
    What each row brings to a figure.

    Args:
        rows (`np.ndarray` of shape `(N, K)`): Numbers that are summed over rows, such as hits and trials.
        value (`Callable`): Sums `(K,)` -> the figure.
        unit (`str`): As in [`Figure`].
        is_share (`bool`): Whether it is the share of trials that went one way: numbers of hits over numbers of trials.
    """

    rows: np.ndarray
    value: Callable[[np.ndarray], float]
    unit: str = "%"
    is_share: bool = False

    def figure(self, seed: int = 0) -> Figure:
        """The figure with its interval."""
        values = _resampled([self], seed)[0] if len(self.rows) else np.empty(0)
        value = self._of(np.ones(len(self.rows)))
        doubt = self._doubt() if value in (0.0, 1.0) else 0.0
        below, above = (doubt, 0.0) if value == 1.0 else (0.0, doubt)
        return _figure(value, values, len(self.rows), self.unit, below, above)

    def against(self, other: "Contributions", seed: int = 0) -> Figure:
        """
        Args:
            other ([`Contributions`]): Of the same rows, in the same order.
            seed (`int`, *optional*, defaults to 0): Of the resampling.

        Returns:
            [`Figure`]: this figure minus the other; both are computed on the same resampled rows.
        """
        if len(self.rows) != len(other.rows):
            raise ValueError(f"A paired comparison needs the same rows, got {len(self.rows)} and {len(other.rows)}.")
        ones = np.ones(len(self.rows))
        mine, others = _resampled([self, other], seed) if len(self.rows) else (np.empty(0), np.empty(0))
        doubt = 0.0
        if self.is_share and other.is_share and len({*map(tuple, self.rows - other.rows)}) == 1:
            doubt = max(self._doubt(), other._doubt())
        found = _figure(self._of(ones) - other._of(ones), mine - others, len(self.rows), self.unit, doubt, doubt)
        return replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0)) if doubt else found

    def _doubt(self) -> float:
        """Exact 97.5 % upper bound of a proportion with no success in so many trials; 0 if the metric is none."""
        trials = self.rows[:, 1].sum() if self.is_share and np.isin(self.rows, (0.0, 1.0)).all() else 0
        return 1 - ((1 - LEVEL) / 2) ** (1 / trials) if trials else 0.0

    def _of(self, weights: np.ndarray) -> float:
        return self.value(weights @ self.rows) if len(self.rows) else math.nan


def mean_of(values: Any, unit: str = "%") -> Contributions:
    """
    Args:
        values (array-like of shape `(N,)`): A score per row.
        unit (`str`, *optional*, defaults to `"%"`): As in [`Figure`].

    Returns:
        [`Contributions`] whose figure is their mean.
    """
    values = np.asarray(values, dtype=float).reshape(-1)
    return ratio_of(values, np.ones(len(values)), unit)


def ratio_of(numerators: Any, denominators: Any, unit: str = "%", is_share: bool = True) -> Contributions:
    """
    Args:
        numerators, denominators (array-like of shape `(N,)`): Per row.
        unit (`str`, *optional*, defaults to `"%"`): As in [`Figure`].
        is_share (`bool`, *optional*, defaults to `True`): As in [`Contributions`]; only of per cent.

    Returns:
        [`Contributions`] whose figure is the sum of one over the sum of the other; no number where that is 0.
    """
    rows = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)], axis=-1)
    return Contributions(rows, lambda sums: sums[0] / sums[1] if sums[1] else math.nan, unit, is_share and unit == "%")


def _resampled(several: list[Contributions], seed: int) -> list[np.ndarray]:
    """Figures of `RESAMPLES` draws of as many rows with replacement; the same rows for all."""
    count = len(several[0].rows)
    generator = np.random.default_rng(seed)
    found = [np.empty(RESAMPLES) for _ in several]
    for draw in range(RESAMPLES):
        weights = np.bincount(generator.integers(count, size=count), minlength=count).astype(float)
        for each, values in zip(several, found, strict=True):
            values[draw] = each._of(weights)
    return found


def _figure(value: float, resampled: np.ndarray, rows: int, unit: str, below: float, above: float) -> Figure:
    kept = resampled[~np.isnan(resampled)]  # a draw may lack what a ratio divides by
    if not len(kept):
        return Figure(value, math.nan, math.nan, rows, unit)
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(float(value), float(min(low, value - below)), float(max(high, value + above)), rows, unit)


__all__ = ["Contributions", "Figure", "mean_of", "ratio_of"]
