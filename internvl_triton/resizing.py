"""Bicubic resizing of 8-bit pictures: PIL's integer arithmetic, bit for bit, as vector code.

Formula: `ImagingResample` of Pillow (libImaging/Resample.c) for BICUBIC and 8 bits a channel: first
along the rows, then along the columns; every result is rounded to 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["compile_kernels", "resize"]

_WEIGHT_BITS = 22  # of the fraction: PIL's PRECISION_BITS
_ROWS = 32  # of a block that is worked on column by column
_PARTS = 4  # of a picture, for threads
_BYTES = 1024  # of a row that stay in the nearest cache while they are summed

Kernel = Callable[..., None]


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, *, pool: Executor | None = None
) -> NDArray[np.uint8]:
    """uint8 (height, width, 3): what PIL's `resize((width, height), BICUBIC)` makes of `pixels`.

    pixels: uint8 (h, w, 3), rows one behind the other. pool: threads that work on parts of it.
    """
    rows, columns = pixels.shape[:2]
    weigh_rows, weigh_columns = compile_kernels()
    if columns != width:
        resized = np.empty((rows, width, 3), np.uint8)
        _run(weigh_columns, pixels, _weights(columns, width), resized, pool)
        pixels = resized
    if rows != height:
        resized = np.empty((height, width, 3), np.uint8)
        _run(weigh_rows, pixels, _weights(rows, height), resized, pool)
        pixels = resized
    return pixels


def _run(
    kernel: Kernel,
    source: NDArray[np.uint8],
    weights: _Weights,
    target: NDArray[np.uint8],
    pool: Executor | None,
) -> None:
    """Fill the rows of `target`."""
    flat = source.reshape(len(source), -1)
    into = target.reshape(len(target), -1)
    if pool is None:
        kernel(flat, *weights, into, 0, len(into))
        return
    size = -(-len(into) // (_PARTS * _ROWS)) * _ROWS
    todo = [
        pool.submit(kernel, flat, *weights, into, begin, min(begin + size, len(into)))
        for begin in range(0, len(into), size)
    ]
    for part in todo:
        part.result()


class _Weights(NamedTuple):
    """Output i is the sum over t < taps[i] of input first[i] + t times weight[i, t] / 2^22."""

    first: NDArray[np.int32]
    taps: NDArray[np.int32]
    weight: NDArray[np.int32]


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int) -> _Weights:
    """To `new` from `old` pixels. Formula: `precompute_coeffs`, `normalize_coeffs_8bpc`."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = (np.arange(new) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int32), 0)
    count = np.minimum((center + support + 0.5).astype(np.int32), old) - first
    taps = np.arange(count.max())
    weight = _bicubic((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    weight[taps >= count[:, None]] = 0.0
    total = np.cumsum(weight, axis=1)[:, -1:]  # one after the other, as PIL adds them
    scaled = weight / total * (1 << _WEIGHT_BITS)
    return _Weights(first, count, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32))


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic convolution kernel with a = -0.5, in PIL's order of operations."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.cache
def compile_kernels() -> tuple[Kernel, Kernel]:
    """The passes down the columns and along the rows, compiled once per process for this machine.

    It takes about a second. Both are called with source, weights and target (uint8 (rows, bytes of
    a row)) and the range of the target's rows to fill, and do not hold the interpreter's lock.
    """
    from numba import njit, types

    in_type = types.Array(types.uint8, 2, "C", readonly=True)
    out_type = types.uint8[:, ::1]
    int_type = types.int64
    signature = types.void(
        in_type,
        types.int32[::1],
        types.int32[::1],
        types.int32[:, ::1],
        out_type,
        int_type,
        int_type,
    )
    half = np.int32(1 << (_WEIGHT_BITS - 1))
    bits = np.int32(_WEIGHT_BITS)
    least, most = np.int32(0), np.int32(255)

    def add(sums: Any, row: Any, weight: Any) -> None:
        for i in range(sums.shape[0]):
            sums[i] += np.int32(row[i]) * weight

    def store(sums: Any, row: Any) -> None:
        for i in range(sums.shape[0]):
            row[i] = min(max(sums[i] >> bits, least), most)

    add, store = njit(add), njit(store)

    def weigh_rows(
        source: Any, first: Any, count: Any, weight: Any, target: Any, begin: int, end: int
    ) -> None:
        sums = np.empty(_BYTES, np.int32)
        for row in range(begin, end):
            for left in range(0, source.shape[1], _BYTES):
                right = min(left + _BYTES, source.shape[1])
                some = sums[: right - left]
                some[:] = half
                for tap in range(count[row]):
                    add(some, source[first[row] + tap, left:right], weight[row, tap])
                store(some, target[row, left:right])

    weigh_rows = njit(signature, nogil=True)(weigh_rows)

    def weigh_columns(
        source: Any, first: Any, count: Any, weight: Any, target: Any, begin: int, end: int
    ) -> None:
        old, new = source.shape[1], target.shape[1]
        across = np.empty((old, _ROWS), np.uint8)
        result = np.empty((new, _ROWS), np.uint8)
        for block in range(begin, end, _ROWS):
            rows = min(_ROWS, end - block)
            for row in range(rows):
                line = source[block + row]
                for i in range(old):
                    across[i, row] = line[i]
            # A pixel's three channels are neighbours: its rows of `across` are one row of pixels.
            weigh_rows(
                across.reshape(old // 3, 3 * _ROWS),
                first,
                count,
                weight,
                result.reshape(new // 3, 3 * _ROWS),
                0,
                new // 3,
            )
            for row in range(rows):
                line = target[block + row]
                for i in range(new):
                    line[i] = result[i, row]

    return weigh_rows, njit(signature, nogil=True)(weigh_columns)
