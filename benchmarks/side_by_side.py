"""Alternatives timed in turn, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

__all__ = ["ratio_row", "time_in_turn"]


def time_in_turn(
    alternatives: dict[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Name -> seconds of each of `rounds` calls, after one that is not counted.

    Every round calls all alternatives, in another order each time.
    """
    random = np.random.default_rng(0)
    names = list(alternatives)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for call in alternatives.values():
        call()
    for _ in range(rounds):
        for index in random.permutation(len(names)):
            began = time.perf_counter()
            alternatives[names[index]]()
            seconds[names[index]].append(time.perf_counter() - began)
    return seconds


def ratio_row(seconds: dict[str, list[float]], *, scale: float = 1.0) -> list[str]:
    """Cells: the median ms of the first alternative, and of each other one with its ratio to it.

    scale: parts of a call that count, such as 1 / pictures. The ratio is the median over rounds of
    other / first, with the smallest and largest in brackets.
    """
    (_, first), *others = seconds.items()
    cells = [f"{1000 * scale * np.median(first):.2f}"]
    for _, other in others:
        ratios = np.divide(other, first)
        low, high = ratios.min(), ratios.max()
        cells.append(f"{1000 * scale * np.median(other):.2f}")
        cells.append(f"{np.median(ratios):.2f} ({low:.2f}-{high:.2f})")
    return cells
