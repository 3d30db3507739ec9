"""Bicubic resizing of 8-bit pictures: PIL's integer arithmetic, bit for bit, as vector code.

Formula: `ImagingResample` of Pillow (libImaging/Resample.c) for BICUBIC and 8 bits a channel: first
along the rows, then along the columns; every result is rounded to 8 bits.

A block of rows is resized along its rows just before the columns need it and stays in the cache
until they have had it; along the rows, its pixels are laid across, so that the same weight meets
neighbours in memory in both passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from internvl_triton.vector_code import LANES, SIDE, transposed_block, weighted_rows

__all__ = ["compile_kernel", "resize_to_tiles"]

_WEIGHT_BITS = 22  # of the fraction: PIL's PRECISION_BITS
_PARTS = 4  # of a picture, for threads

Kernel = Callable[..., None]


def resize_to_tiles(
    pixels: NDArray[np.uint32],
    *grids: tuple[NDArray[np.uint8], int],
    pool: Executor | None = None,
) -> None:
    """Fill the tiles of each grid: what PIL's `resize(..., BICUBIC)` makes of a picture, cut up.

    pixels: uint32 (h, w), of `media.packed_pixels`. grids: uint8 (rows * columns, tile height, tile
    width, 3), row by row, and its columns. pool: threads that work on parts of the pictures.
    """
    kernel = compile_kernel()
    old_height, old_width = pixels.shape
    todo = []
    for tiles, columns in grids:
        num_tiles, tile_height, tile_width = tiles.shape[:3]
        height = num_tiles // columns * tile_height
        across, down = _weights(old_width, columns * tile_width), _weights(old_height, height)
        into = tiles.reshape(num_tiles, tile_height, tile_width * 3)
        resize = functools.partial(kernel, pixels, *across, *down, into, columns)
        if pool is None:
            resize(0, height)
            continue
        size = -(-height // _PARTS)
        todo += [
            pool.submit(resize, begin, min(begin + size, height))
            for begin in range(0, height, size)
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
def compile_kernel() -> Kernel:
    """The resampling, compiled once per process for this machine, which takes a second or two.

    Called with the pixels, the weights along the rows and along the columns, the tiles (uint8
    (tiles, rows, bytes of a row)), the number of tiles side by side, and the range of the resized
    picture's rows to fill. Does not hold the interpreter's lock.
    """
    from numba import njit, types

    all_lanes = weighted_rows(_WEIGHT_BITS, range(LANES))
    rgb_lanes = weighted_rows(_WEIGHT_BITS, [lane for lane in range(LANES) if lane % 4 < 3])
    transpose = transposed_block()
    rgb_bytes = LANES // 4 * 3

    @njit
    def resize_block(
        source: Any, begin: int, first: Any, count: Any, weight: Any, work: Any, ring: Any, at: int
    ) -> None:
        """Resize SIDE rows of the source from `begin` along themselves, into `ring` from `at`."""
        across, result = work
        step, rows = 4 * source.shape[1], min(SIDE, source.shape[0] - begin)
        corner = source.ctypes.data + begin * step
        whole = source.shape[1] // SIDE * SIDE if rows == SIDE else 0
        for x in range(0, whole, SIDE):
            transpose(corner + 4 * x, step, across[x].ctypes.data, LANES)
        for x in range(whole, source.shape[1]):
            for row in range(rows):
                across[x, row] = source[begin + row, x]
        for x in range(len(first)):
            all_lanes(
                across.ctypes.data,
                LANES,
                first[x],
                len(across),
                weight[x].ctypes.data,
                count[x],
                result[x].ctypes.data,
            )
        for x in range(0, len(result), SIDE):
            transpose(result[x].ctypes.data, LANES, ring[at, x:].ctypes.data, 4 * ring.shape[1])

    int_type, ints = types.int64, types.int32[::1]
    weights = (ints, ints, types.int32[:, ::1])
    picture = types.Array(types.uint32, 2, "C", readonly=True)
    tiles_type = types.uint8[:, :, ::1]

    @njit(
        types.void(picture, *weights, *weights, tiles_type, int_type, int_type, int_type),
        nogil=True,
    )
    def resample(
        source: Any,
        across_first: Any,
        across_count: Any,
        across_weight: Any,
        first: Any,
        count: Any,
        weight: Any,
        tiles: Any,
        columns: int,
        begin: int,
        end: int,
    ) -> None:
        tile_height, tile_bytes = tiles.shape[1], tiles.shape[2]
        tile_width = tile_bytes // 3
        width = columns * tile_width
        blocks = (width + SIDE - 1) // SIDE
        work = (
            np.empty((source.shape[1], SIDE), np.uint32),
            np.empty((blocks * SIDE, SIDE), np.uint32),
        )
        # Row r of the source, once resized along itself, is row r % len(ring) of the ring, which
        # holds a whole window and one block more. The last lanes of a tile may lie beyond it.
        length = (weight.shape[1] + 2 * SIDE - 1) // SIDE * SIDE
        ring = np.empty((length, width + SIDE), np.uint32)
        rest = np.empty(rgb_bytes, np.uint8)
        whole = tile_bytes // rgb_bytes * rgb_bytes
        done = first[begin] // SIDE * SIDE
        for y in range(begin, end):
            while done < first[y] + count[y]:
                resize_block(
                    source,
                    done,
                    across_first,
                    across_count,
                    across_weight,
                    work,
                    ring,
                    done % length,
                )
                done += SIDE
            at, weights_of_y = first[y] % length, weight[y].ctypes.data
            for column in range(columns):
                window = ring.ctypes.data + column * tile_width * 4
                into = tiles[y // tile_height * columns + column, y % tile_height]
                for i in range(0, tile_bytes, rgb_bytes):
                    target = into.ctypes.data + i if i < whole else rest.ctypes.data
                    rgb_lanes(
                        window + i // 3 * 4,
                        ring.shape[1] * 4,
                        at,
                        length,
                        weights_of_y,
                        count[y],
                        target,
                    )
                for i in range(whole, tile_bytes):
                    into[i] = rest[i - whole]

    return resample
