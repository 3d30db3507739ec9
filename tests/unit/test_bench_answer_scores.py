"""Scores and intervals against hand arithmetic, brute force and published values."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from benchmarks.answer_scores import (
    anls,
    bootstrap_interval,
    edit_distance,
    exact_match,
    mcnemar_p,
    wilson_interval,
)
from benchmarks.metrics import NoMetricValue


def test_exact_match_is_strict_but_for_the_ends() -> None:
    assert exact_match(" A star.\n", ["A star.", "A circle."])
    assert not exact_match("a star.", ["A star."])
    assert not exact_match("", ["A star."])


@functools.cache
def recursive_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        recursive_distance(a[1:], b) + 1,
        recursive_distance(a, b[1:]) + 1,
        recursive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance_is_the_recursive_definition() -> None:
    words = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)]
    for a, b in itertools.product([*words, "kitten", "sitting"], repeat=2):
        assert edit_distance(a, b) == recursive_distance(a, b), (a, b)


def test_anls() -> None:
    assert anls("The NUMBER  is 42.", ["the number is 42."]) == 1.0
    # distance 3 (k->s, e->i, +g) of at most 7 characters
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("kitten", ["sitting", "mitten"]) == pytest.approx(1 - 1 / 6)
    assert anls("ab", ["ac"]) == 0.0  # distance 1 of 2 is not below the threshold of 0.5
    assert anls("", ["yes"]) == 0.0
    assert anls("", [" "]) == 1.0


def test_wilson_interval_solves_its_equation() -> None:
    # The bounds are where |p - bound| = z sqrt(bound (1 - bound) / n).
    z = 1.959964
    for right, asked in ((0, 10), (3, 10), (10, 10), (812, 1000)):
        for bound in wilson_interval(right, asked):
            distance = abs(right / asked - bound)
            assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / asked), abs=1e-6)
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_bootstrap_of_independent_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(values.tolist(), range(400))
    reach = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - reach, abs=0.05)
    assert high == pytest.approx(values.mean() + reach, abs=0.05)
    assert bootstrap_interval(values.tolist(), range(400)) == (low, high)  # the seed is fixed


def test_bootstrap_draws_whole_groups() -> None:
    alone = [0.0, 1.0] * 50
    low, high = bootstrap_interval(alone, range(100))
    # The same values, ten of a kind in each picture: as uncertain as ten values.
    together = [0.0] * 50 + [1.0] * 50
    wide_low, wide_high = bootstrap_interval(together, [i // 10 for i in range(100)])
    assert wide_high - wide_low > 2.5 * (high - low)  # sqrt(10) = 3.2
    assert bootstrap_interval([0.25] * 7, "aabbccc") == (0.25, 0.25)
    with pytest.raises(NoMetricValue):
        bootstrap_interval([0.25, 0.5], "aa")  # every draw is the same


def test_mcnemar() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(0, 6) == pytest.approx(2 / 64)  # all six of one kind
    assert mcnemar_p(1, 8) == mcnemar_p(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert 0 < mcnemar_p(1000, 3000) < 1e-100
