"""Tiles and grids against the reference formula, transcribed in tests.reference."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_triton.limits import Limits
from internvl_triton.media import decode_image, packed_pixels
from internvl_triton.tiling import (
    TileGrid,
    choose_grid,
    count_tiles,
    tile_image,
)
from tests.reference import reference_tiles

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tile_grids.json").read_text())


def sizes() -> list[tuple[int, int]]:
    """More than 200 sizes: round ones, both sides of every tie, and seeded random ones."""
    fixed = [(1, 1000), (1000, 1), (4000, 2000), (633, 633), (634, 634), (448, 448), (1, 1)]
    fixed += [(side, side) for side in range(100, 2100, 100)]
    fixed += [(448 * w, 448 * h) for w in range(1, 7) for h in range(1, 7)]
    fixed += [(320, 240), (640, 480), (800, 600), (1280, 720), (1920, 1080), (3840, 2160)]
    fixed += [(896, 447), (896, 448), (896, 449), (400, 200), (200, 400), (600, 300), (633, 634)]
    generator = np.random.default_rng(0)
    fixed += [tuple(map(int, pair)) for pair in generator.integers(1, 2500, (140, 2))]
    return list(dict.fromkeys(fixed))


@pytest.mark.parametrize("max_tiles", [1, 2, 6, 12, 24, 40])
def test_the_number_of_tiles_is_the_references(max_tiles: int) -> None:
    assert len(sizes()) >= 200
    for width, height in sizes():
        ours = choose_grid(width, height, max_tiles=max_tiles, tile_size=448)
        # 4-pixel tiles: the reference's own choice of grid, without resizing megapixels.
        reference = _reference_grid(width, height, max_tiles)
        assert (ours.columns, ours.rows) == reference, (width, height)


def _reference_grid(width: int, height: int, max_num: int) -> tuple[int, int]:
    """`find_closest_aspect_ratio`, by brute force over all grids in every order of equal areas."""
    grids = [
        (i, j) for i in range(1, max_num + 1) for j in range(1, max_num + 1) if i * j <= max_num
    ]
    smallest = min(abs(width / height - i / j) for i, j in grids)
    tied = [grid for grid in grids if abs(width / height - grid[0] / grid[1]) == smallest]
    tied.sort(key=lambda grid: grid[0] * grid[1])
    best = tied[0]
    for grid in tied[1:]:
        if width * height > 0.5 * 448 * 448 * grid[0] * grid[1]:
            best = grid
    return best


@pytest.mark.parametrize("size", GOLDEN["grids"], ids=str)
def test_published_grids(size: str) -> None:
    width, height = map(int, size.split("x"))
    expected = TileGrid(*GOLDEN["grids"][size])
    assert choose_grid(width, height, max_tiles=12, tile_size=448) == expected


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A photo-like picture: smooth gradients, edges and noise."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    noise = np.random.default_rng(width * 10007 + height).integers(0, 60, (height, width, 3))
    pixels = np.stack([x * 7 % 200, (x + y) * 3 % 200, (x // 16 + y // 16) % 2 * 190], -1) + noise
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "size",
    [(800, 600), (1280, 720), (333, 1000), (448, 448), (300, 200), (1, 1000), (1000, 1000)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_tiles_are_bit_equal_to_the_reference(size: tuple[int, int]) -> None:
    image = _picture(*size)
    ours = tile_image(packed_pixels(image), max_tiles=12, tile_size=448, use_thumbnail=True)
    np.testing.assert_array_equal(ours, reference_tiles(image))
    assert len(ours) == count_tiles(*size, max_tiles=12, tile_size=448, use_thumbnail=True)


@pytest.mark.parametrize(
    "size",
    [(1280, 720), (1920, 1080), (999, 333), (1001, 500), (77, 900), (2, 3), (4100, 700)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_threads_make_the_same_tiles(size: tuple[int, int]) -> None:
    image = _picture(*size)
    with ThreadPoolExecutor(3) as pool:
        ours = tile_image(
            packed_pixels(image), max_tiles=12, tile_size=448, use_thumbnail=True, pool=pool
        )
    np.testing.assert_array_equal(ours, reference_tiles(image))


def test_every_size_of_the_table_gives_the_references_tiles() -> None:
    """All sizes at 32-pixel tiles: the same formula, a hundredth of the pixels."""
    for width, height in sizes():
        scaled = max(1, width // 14), max(1, height // 14)
        image = _picture(*scaled)
        ours = tile_image(packed_pixels(image), max_tiles=12, tile_size=32, use_thumbnail=True)
        np.testing.assert_array_equal(
            ours, reference_tiles(image, image_size=32), err_msg=f"{scaled}"
        )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_colour_modes_become_rgb_as_in_the_reference(mode: str) -> None:
    image = _picture(500, 300, mode)
    ours = tile_image(packed_pixels(image), max_tiles=6, tile_size=448, use_thumbnail=True)
    np.testing.assert_array_equal(ours, reference_tiles(image, max_num=6))


def test_exif_orientation_is_ignored_as_in_the_reference() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    _picture(600, 300).save(file, "JPEG", exif=exif)
    data = file.getvalue()
    pixels = decode_image(data, "image 1", Limits(max_seq_len=1024))
    ours = tile_image(pixels, max_tiles=12, tile_size=448, use_thumbnail=True)
    assert len(ours) == 3  # 2 x 1 and the thumbnail
    np.testing.assert_array_equal(ours, reference_tiles(Image.open(io.BytesIO(data))))


def test_the_thumbnail_comes_last_and_only_with_several_tiles() -> None:
    image = _picture(896, 448)
    tiles = tile_image(packed_pixels(image), max_tiles=12, tile_size=448, use_thumbnail=True)
    assert tiles.shape == (3, 448, 448, 3)  # 2 x 1 tiles + thumbnail
    np.testing.assert_array_equal(tiles[2], np.asarray(image.resize((448, 448))))
    without = tile_image(packed_pixels(image), max_tiles=12, tile_size=448, use_thumbnail=False)
    np.testing.assert_array_equal(without, tiles[:2])
    assert (
        len(tile_image(packed_pixels(image), max_tiles=1, tile_size=448, use_thumbnail=True)) == 1
    )


def test_twelve_tiles_and_a_thumbnail_are_thirteen() -> None:
    assert count_tiles(800, 600, max_tiles=12, tile_size=448, use_thumbnail=True) == 13
