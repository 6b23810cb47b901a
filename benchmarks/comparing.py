"""What the benchmarks share: two variants in turn, quotients of one round, a table printed and kept."""

import statistics
from collections.abc import Callable
from pathlib import Path


WARM_UP = 2


def alternate(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds that both variants report, round by round; they take turns in going first, and warm up before."""
    seconds = {first: [], second: []}
    for number in range(rounds + WARM_UP):
        for variant in (first, second) if number % 2 else (second, first):
            spent = variant()
            if number >= WARM_UP:
                seconds[variant].append(spent)
    return seconds[first], seconds[second]


def quotient(slow: list[float], fast: list[float], digits: int = 2) -> str:
    """`slow / fast`, the median over rounds and the middle half."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def publish(lines: list[str], output: Path | None) -> None:
    """Prints a table, and writes it where `output` says."""
    table = "\n".join(lines)
    print(table)
    if output:
        output.write_text(table + "\n")
