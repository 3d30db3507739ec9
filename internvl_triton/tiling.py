"""Dynamic tiling: one picture to 448 x 448 tiles, bit-equal to the reference.

Formula: `dynamic_preprocess` and `find_closest_aspect_ratio` of the InternVL2.5 model card.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from internvl_triton.resizing import resize_to_tiles

__all__ = ["TileGrid", "choose_grid", "count_tiles", "tile_image"]


@dataclass(frozen=True)
class TileGrid:
    """columns x rows tiles. The thumbnail, when there is one, is not part of the grid."""

    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        return self.columns * self.rows

    def num_tiles_with_thumbnail(self, *, use_thumbnail: bool) -> int:
        """A picture of one tile has no thumbnail: it would be the same tile again."""
        return self.num_tiles + (1 if use_thumbnail and self.num_tiles > 1 else 0)


@lru_cache(maxsize=64)
def _grids(max_tiles: int) -> tuple[TileGrid, ...]:
    """All grids of 1 to max_tiles tiles, smallest first; equal areas in the reference's order.

    The order inside one area is that of a CPython set of pairs, as in the reference.
    """
    pairs = {
        (columns, rows)
        for n in range(1, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if columns * rows <= max_tiles
    }
    return tuple(TileGrid(*pair) for pair in sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def choose_grid(width: int, height: int, *, max_tiles: int, tile_size: int) -> TileGrid:
    """The grid whose aspect ratio is closest to width / height.

    A strictly closer grid wins; on an exact tie the later, larger one replaces the earlier only
    if the picture has more than half of its pixels: width * height > 0.5 * tile_size^2 * tiles.
    """
    aspect_ratio = width / height
    best, best_difference = TileGrid(1, 1), float("inf")
    for grid in _grids(max_tiles):
        difference = abs(aspect_ratio - grid.columns / grid.rows)
        if difference < best_difference:
            best, best_difference = grid, difference
        elif (
            difference == best_difference
            and width * height > 0.5 * tile_size * tile_size * grid.num_tiles
        ):
            best = grid
    return best


def count_tiles(
    width: int, height: int, *, max_tiles: int, tile_size: int, use_thumbnail: bool
) -> int:
    """Tiles that `tile_image` makes of a width x height picture, thumbnail included."""
    grid = choose_grid(width, height, max_tiles=max_tiles, tile_size=tile_size)
    return grid.num_tiles_with_thumbnail(use_thumbnail=use_thumbnail)


def tile_image(
    pixels: NDArray[np.uint32],
    *,
    max_tiles: int,
    tile_size: int,
    use_thumbnail: bool,
    pool: Executor | None = None,
) -> NDArray[np.uint8]:
    """uint8 (num_tiles, tile_size, tile_size, 3): grid tiles row by row, then the thumbnail.

    The picture is resized to the grid with PIL's bicubic filter, without keeping its aspect ratio.

    pixels: uint32 (height, width), of `media.packed_pixels`.
    pool: threads that work on parts of the picture; the tiles are the same.
    """
    height, width = pixels.shape
    grid = choose_grid(width, height, max_tiles=max_tiles, tile_size=tile_size)
    num_tiles = grid.num_tiles_with_thumbnail(use_thumbnail=use_thumbnail)
    tiles = np.empty((num_tiles, tile_size, tile_size, 3), np.uint8)
    grids = [(tiles[: grid.num_tiles], grid.columns)]
    if num_tiles > grid.num_tiles:
        grids.append((tiles[-1:], 1))
    resize_to_tiles(pixels, *grids, pool=pool)
    return tiles
