"""The vector code alone, against the formulas in its docstrings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from internvl_triton.vector_code import LANES, SIDE, transposed_block, weighted_rows

RNG = np.random.default_rng(0)
BITS = 10
KEPT = [lane for lane in range(LANES) if lane % 4 < 3]


@pytest.fixture(scope="module")
def weigh() -> Any:
    rows_of_bytes = weighted_rows(BITS, KEPT)

    @njit
    def call(rows: Any, column: int, at: int, weight: Any, into: Any) -> None:
        rows_of_bytes(
            rows.ctypes.data + column,
            rows.shape[1],
            at,
            len(rows),
            weight.ctypes.data,
            len(weight),
            into.ctypes.data,
        )

    return call


@pytest.mark.parametrize(("at", "taps"), [(0, 1), (0, 5), (4, 1), (3, 4), (2, 5)])
def test_sums_of_rows_that_begin_anywhere_in_the_ring(weigh: Any, at: int, taps: int) -> None:
    rows = RNG.integers(0, 256, (5, 3 * LANES), np.uint8)
    weight = RNG.integers(-800, 1000, taps).astype(np.int32)
    into = np.zeros(len(KEPT) + 1, np.uint8)
    weigh(rows, 7, at, weight, into)

    picked = rows[(at + np.arange(taps)) % len(rows), 7 : 7 + LANES].astype(np.int64)
    sums = (2 ** (BITS - 1) + weight @ picked) >> BITS
    np.testing.assert_array_equal(into[:-1], np.clip(sums, 0, 255)[KEPT])
    assert into[-1] == 0, "wrote behind the lanes that it keeps"


def test_sums_are_rounded_and_clipped(weigh: Any) -> None:
    rows = np.arange(LANES, dtype=np.uint8)[None]
    into = np.empty(len(KEPT), np.uint8)
    for weight, wanted in ((2**BITS // 2, (0, 1, 1)), (-(2**BITS), (0, 0, 0))):  # 0, 1, 2 times
        weigh(rows, 0, 0, np.array([weight], np.int32), into)
        assert tuple(into[:3]) == wanted
    weigh(rows, 0, 0, np.array([9 * 2**BITS], np.int32), into)
    assert into[-1] == 255, "62 * 9"


def test_a_block_is_transposed() -> None:
    transpose = transposed_block()

    @njit
    def call(block: Any, into: Any) -> None:
        transpose(block.ctypes.data, 4 * block.shape[1], into.ctypes.data, 4 * into.shape[1])

    block = RNG.integers(0, 2**32, (SIDE, SIDE + 3), np.uint32)
    into = np.zeros((SIDE, SIDE + 5), np.uint32)
    call(block, into)
    np.testing.assert_array_equal(into[:, :SIDE], block[:, :SIDE].T)
    assert not into[:, SIDE:].any()
