"""Resizing against PIL's own, bit for bit."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from internvl_triton.media import packed_pixels
from internvl_triton.resizing import resize_to_tiles

SIDE = st.one_of(st.integers(1, 40), st.integers(1, 900), st.sampled_from([1, 2, 448, 896, 1792]))


def noise(width: int, height: int) -> NDArray[np.uint8]:
    """Pixels with every value side by side: no rounding error stays small enough to hide."""
    return np.random.default_rng(width * 7919 + height).integers(
        0, 256, (height, width, 3), np.uint8
    )


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, pool: Executor | None = None
) -> NDArray[np.uint8]:
    tile = np.empty((1, height, width, 3), np.uint8)
    resize_to_tiles(packed_pixels(Image.fromarray(pixels)), (tile, 1), pool=pool)
    return tile[0]


def pil(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
def test_every_size_to_every_size(width: int, height: int, new_width: int, new_height: int) -> None:
    pixels = noise(width, height)
    np.testing.assert_array_equal(
        resize(pixels, new_width, new_height), pil(pixels, new_width, new_height)
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1920, 1080), (1792, 896)),
        ((3840, 2160), (448, 448)),
        ((1, 3000), (448, 5376)),  # taller than 100 times its width
        ((3000, 1), (5376, 448)),
        ((5, 3000), (448, 448)),
        ((20_000, 3), (448, 448)),
        ((448, 1000), (448, 1344)),  # only one of the passes
        ((1000, 448), (1344, 448)),
        ((448, 448), (448, 448)),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_narrow_and_untouched_ones_with_threads(
    old: tuple[int, int], new: tuple[int, int], threads: int
) -> None:
    pixels = noise(*old)
    with ThreadPoolExecutor(threads) as pool:
        np.testing.assert_array_equal(resize(pixels, *new, pool=pool), pil(pixels, *new))


@pytest.mark.parametrize("value", [0, 255])
def test_edges_overshoot_to_black_and_white(value: int) -> None:
    """The filter's negative lobes leave the range of 8 bits beside an edge."""
    pixels = np.full((64, 64, 3), 255 - value, np.uint8)
    pixels[:, 32:] = value
    pixels[20:40] = 128
    np.testing.assert_array_equal(resize(pixels, 300, 300), pil(pixels, 300, 300))


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_are_pieces_of_the_resized_picture(columns: int, rows: int, threads: int) -> None:
    pixels, height, width = noise(97, 61), 20, 28
    tiles = np.zeros((rows * columns, height, width, 3), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        resize_to_tiles(packed_pixels(Image.fromarray(pixels)), (tiles, columns), pool=pool)
    whole = pil(pixels, columns * width, rows * height)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        np.testing.assert_array_equal(tile, whole[top : top + height, left : left + width])
