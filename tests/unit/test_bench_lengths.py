"""Lengths follow the distribution that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.lengths import Lengths
from internvl_triton.errors import InvalidRequest


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "x", "9-3", "-4", "5-", "1_0", "99999999999999999999"),
        *("normal:5", "normal:0:1", "normal:nan:1", "normal:inf:1", "normal:5:nan", "normal:5:inf"),
        *("normal:5:-1", "normal:1e300:1", "normal:2000000:1", "normal:5:2000000"),
    ],
)
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no distribution of lengths") as refused:
        Lengths(text)
    assert repr(text) in str(refused.value)
    assert "give 64, 32-128 or normal:64:16" in str(refused.value)


def test_lengths() -> None:
    random = np.random.default_rng(0)
    assert {Lengths("7").draw(random) for _ in range(5)} == {7}
    assert {Lengths("3-5").draw(random) for _ in range(100)} == {3, 4, 5}
    drawn = [Lengths("normal:64:16").draw(random) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(64, abs=1.5)
    assert np.std(drawn) == pytest.approx(16, abs=1.5)
    assert min(Lengths("normal:1:5").draw(random) for _ in range(50)) == 1
    assert {Lengths("normal:2.6:0").draw(random) for _ in range(5)} == {3}
