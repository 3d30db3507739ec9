"""How right answers are, with the uncertainty of a finite number of questions. Pure functions.

Questions about one picture are not independent, so the bootstraps draw whole groups (pictures);
Wilson's interval and McNemar's test take every question as independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics import NoMetricValue

__all__ = [
    "Interval",
    "anls",
    "bootstrap_interval",
    "edit_distance",
    "exact_match",
    "mcnemar_p",
    "wilson_interval",
]

Interval = tuple[float, float]

_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
_ANLS_THRESHOLD = 0.5
_RESAMPLES = 2000


def exact_match(given: str, right: Sequence[str]) -> bool:
    """Whether `given` equals one of the right answers, white space at both ends aside."""
    return given.strip() in {answer.strip() for answer in right}


def anls(given: str, right: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the closest right answer, 0 to 1.

    Formula: max over right answers a of s(a, o), with NL = edit_distance(a, o) / max(|a|, |o|) and
    s = 1 - NL where NL < 0.5, else 0; case and runs of white space do not count. Its mean over all
    questions is ANLS (ST-VQA, Biten et al. 2019, equation 1; DocVQA, Mathew et al. 2021).
    """
    output = _normalised(given)
    return max(_similarity(_normalised(answer), output) for answer in right)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions of one character."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def wilson_interval(right: int, asked: int) -> Interval:
    """95 % interval of a proportion.

    Formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = right / n, n = asked
    (Wilson 1927). Unlike p +- 1.96 sqrt(p(1-p)/n) it stays sensible at 0 and at 100 %.
    """
    assert 0 <= right <= asked, (right, asked)
    assert asked, "no question was asked"
    p, z2 = right / asked, _Z_95**2
    middle = p + z2 / (2 * asked)
    reach = _Z_95 * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2))
    whole = 1 + z2 / asked
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable], *, seed: int = 0
) -> Interval:
    """95 % percentile bootstrap interval of the mean of `values`, resampling whole groups.

    Formula: the 2.5 % and 97.5 % quantiles, over 2,000 draws of as many groups as there are, with
    replacement, of (sum of the drawn groups' values) / (number of them). For two runs over the
    same questions, give the differences question by question (paired bootstrap).

    Raises NoMetricValue of a single group, whose draws are all the same.
    """
    names = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        raise NoMetricValue("one group")
    index = np.array([names[group] for group in groups])
    sums = np.bincount(index, weights=np.asarray(values, np.float64))
    counts = np.bincount(index).astype(np.float64)
    random = np.random.default_rng(seed)
    means: NDArray[np.float64] = np.empty(_RESAMPLES)
    for draw in range(_RESAMPLES):
        drawn = random.integers(len(names), size=len(names))
        means[draw] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of McNemar's test.

    only_first, only_second: questions that just one of two runs got right. Formula: with
    n = only_first + only_second and k = min of both, min(1, 2 * sum_{i<=k} C(n, i) / 2^n): the
    chance of so uneven a split if either run were as likely to be the right one.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n))


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, output: str) -> float:
    longest = max(len(answer), len(output))
    if not longest:
        return 1.0
    distance = edit_distance(answer, output) / longest
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0
