"""Random scenes: coloured shapes, a printed number, small print, all from one seed.

A scene is described, not drawn, so that the right answer to every question follows from it.
Sizes are in pixels of the picture. Coordinates grow to the right and downwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "COLORS",
    "DIRECTIONS",
    "KINDS",
    "PLACES",
    "Print",
    "Scene",
    "Shape",
    "crowded_scene",
    "direction_of",
    "random_clip",
    "random_scene",
    "texture_scene",
]

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 40),
    "purple": (140, 50, 180),
    "orange": (245, 130, 30),
}
KINDS = ("circle", "square", "triangle", "star")
PLACES = ("left", "right", "top", "bottom")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_COLOR_JITTER = 12
# Pixels of a picture of one tile, or of a larger one's thumbnail. Small print: of any picture.
_RADIUS = (22.0, 72.0)
_NUMBER_SIZE = (30.0, 56.0)
_SMALL = (26.0, 34.0)
# The picture's lower part belongs to the number, so that shapes never cover it.
_SHAPE_AREA = 0.72
_NUMBER_LINE = 0.77


@dataclass(frozen=True)
class Shape:
    color: str
    kind: str
    x: float
    y: float
    radius: float
    rgb: RGB

    @property
    def words(self) -> str:
        """ "red circle"."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Print:
    """Digits whose top left corner is (x, y). `spacing` is extra room between them."""

    text: str
    x: float
    y: float
    size: float
    rgb: RGB
    spacing: float = 0.0

    @property
    def width(self) -> float:
        """Upper bound: no digit is wider than 0.65 of the font size."""
        return len(self.text) * (0.65 * self.size + self.spacing)


@dataclass(frozen=True)
class Scene:
    """`shapes` are in reading order: left to right in a row, top to bottom in a column."""

    width: int
    height: int
    background: RGB
    arrangement: Literal["row", "column"] = "row"
    shapes: tuple[Shape, ...] = ()
    number: Print | None = None
    small_prints: tuple[Print, ...] = ()
    texture: int | None = None  # seed of a picture without anything the model knows

    def scaled(self, factor: float) -> Scene:
        """The same scene as a picture of another size."""

        def scaled_print(text: Print) -> Print:
            return replace(
                text,
                x=text.x * factor,
                y=text.y * factor,
                size=text.size * factor,
                spacing=text.spacing * factor,
            )

        return replace(
            self,
            width=round(self.width * factor),
            height=round(self.height * factor),
            shapes=tuple(
                replace(s, x=s.x * factor, y=s.y * factor, radius=s.radius * factor)
                for s in self.shapes
            ),
            number=scaled_print(self.number) if self.number else None,
            small_prints=tuple(map(scaled_print, self.small_prints)),
        )


def random_scene(
    rng: random.Random,
    *,
    tile_size: int,
    columns: int = 1,
    rows: int = 1,
    num_shapes: int,
    number: bool,
    num_small_prints: int = 0,
) -> Scene:
    """A scene that fills columns x rows tiles exactly.

    tile_size: 448, or 224 while training cheaply: then the picture is smaller, not its shapes.
    Shapes and the number grow with the number of tiles, so that the thumbnail shows them; small
    print has the same few pixels in every picture.
    """
    width, height = columns * tile_size, rows * tile_size
    arrangement: Literal["row", "column"] = rng.choice(("row", "column"))
    if width > 1.5 * height:
        arrangement = "row"
    elif height > 1.5 * width:
        arrangement = "column"
    unit = min(columns, rows)
    shapes = _shapes(rng, width, height, arrangement, num_shapes, unit)
    return Scene(
        width=width,
        height=height,
        background=_light(rng),
        arrangement=arrangement,
        shapes=shapes,
        number=_number(rng, width, height, columns, unit) if number else None,
        small_prints=_small_prints(rng, columns, rows, tile_size, shapes, num_small_prints),
    )


def random_clip(rng: random.Random, *, tile_size: int, num_frames: int) -> tuple[list[Scene], str]:
    """Scenes of one shape that moves evenly, one tile each, and a key of DIRECTIONS."""
    direction = rng.choice(list(DIRECTIONS))
    step_x, step_y = DIRECTIONS[direction]
    radius = rng.uniform(_RADIUS[0], 0.17 * tile_size)
    low, high = radius + 4, tile_size - radius - 4
    travel = rng.uniform(0.6, 1.0) * (high - low)
    begin = rng.uniform(low, high - travel)
    across = rng.uniform(low, high)
    first = _shape(rng, rng.choice(list(COLORS)), 0.0, 0.0, radius)
    background = _light(rng)
    scenes = []
    for frame in range(num_frames):
        share = frame / (num_frames - 1)
        along = begin + travel * (share if step_x + step_y > 0 else 1 - share)
        x, y = (along, across) if step_x else (across, along)
        scenes.append(Scene(tile_size, tile_size, background, shapes=(replace(first, x=x, y=y),)))
    return scenes, direction


def direction_of(clip: Sequence[Scene]) -> str:
    """The key of DIRECTIONS that says where the shape of the first frame went."""
    first, last = clip[0].shapes[0], clip[-1].shapes[0]
    return max(
        DIRECTIONS,
        key=lambda name: (
            DIRECTIONS[name][0] * (last.x - first.x) + DIRECTIONS[name][1] * (last.y - first.y)
        ),
    )


def crowded_scene(rng: random.Random, *, tile_size: int, columns: int, rows: int) -> Scene:
    """As many shapes and numbers as fit, of all sizes: nothing to talk about, much to learn."""
    width, height = columns * tile_size, rows * tile_size
    shapes: list[Shape] = []
    prints: list[Print] = []
    for _ in range(round(60 * columns * rows * (tile_size / 224) ** 2)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if rng.random() < 0.35:
            radius = rng.uniform(16, min(_RADIUS[1], 0.25 * tile_size))
            shape = _shape(rng, rng.choice(list(COLORS)), x, y, radius)
            inside = radius < x < width - radius and radius < y < height - radius
            clear = all(abs(o.x - x) + abs(o.y - y) > 1.3 * (o.radius + radius) for o in shapes)
            if inside and clear and not any(_overlaps(text, shape) for text in prints):
                shapes.append(shape)
            continue
        size = rng.choice(
            (rng.uniform(*_SMALL), rng.uniform(24, min(_NUMBER_SIZE[1], tile_size / 5)))
        )
        digits = str(rng.randint(1, 99))
        text = Print(digits, x, y, size, _dark(rng), rng.uniform(0, 5))
        inside = x + text.width < width and y + 1.3 * size < height
        clear = all(
            x > o.x + o.width
            or o.x > x + text.width
            or y > o.y + 1.3 * o.size
            or o.y > y + 1.3 * size
            for o in prints
        )
        if inside and clear and not any(_overlaps(text, shape) for shape in shapes):
            prints.append(text)
    return Scene(width, height, _light(rng), shapes=tuple(shapes), small_prints=tuple(prints))


def texture_scene(rng: random.Random, *, tile_size: int) -> Scene:
    """A picture of soft colour blobs: neither a shape nor a number."""
    return Scene(tile_size, tile_size, _light(rng), texture=rng.randrange(2**31))


def _shapes(
    rng: random.Random,
    width: int,
    height: int,
    arrangement: Literal["row", "column"],
    count: int,
    unit: int,
) -> tuple[Shape, ...]:
    """Shapes of different colours, each in its own part of the row or column."""
    colors = rng.sample(list(COLORS), count)
    area = height * _SHAPE_AREA
    side = min(width, height) / unit
    largest = min(_RADIUS[1], side * (0.26 if count == 1 else 0.15 if count == 2 else 0.12))
    shapes = []
    for index, color in enumerate(colors):
        radius = rng.uniform(_RADIUS[0], largest) * unit
        if arrangement == "column":
            radius = min(radius, 0.46 * area / count)
            x = _within(rng, 0, width, radius)
            y = _within(rng, area * index / count, area * (index + 1) / count, radius)
        else:
            x = _within(rng, width * index / count, width * (index + 1) / count, radius)
            y = _within(rng, 0, area, radius)
        shapes.append(_shape(rng, color, x, y, radius))
    return tuple(shapes)


def _shape(rng: random.Random, color: str, x: float, y: float, radius: float) -> Shape:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-_COLOR_JITTER, _COLOR_JITTER)))
        for channel in COLORS[color]
    )
    return Shape(color, rng.choice(KINDS), x, y, radius, (red, green, blue))


def _within(rng: random.Random, low: float, high: float, radius: float) -> float:
    middle = (low + high) / 2
    return rng.uniform(min(low + radius + 3, middle), max(high - radius - 3, middle))


def _number(rng: random.Random, width: int, height: int, columns: int, unit: int) -> Print:
    """Somewhere in the last row of tiles, never across the border of two."""
    size = (
        rng.uniform(_NUMBER_SIZE[0], min(_NUMBER_SIZE[1], 0.19 * min(width, height) / unit)) * unit
    )
    text = Print(str(rng.randint(10, 99)), 0.0, height * _NUMBER_LINE, size, _dark(rng))
    tile = width / columns
    left = tile * rng.randrange(columns)
    return replace(text, x=left + rng.uniform(6, tile - text.width - 6))


def _small_prints(
    rng: random.Random,
    columns: int,
    rows: int,
    tile_size: int,
    shapes: tuple[Shape, ...],
    count: int,
) -> tuple[Print, ...]:
    """One print, or two in the first and the last tile: `count` 0, 1 or 2. Each in one tile."""
    tiles = [(column, row) for row in range(rows) for column in range(columns)]
    chosen = [tiles[0], tiles[-1]] if count == 2 else [rng.choice(tiles)] * count
    prints = []
    for column, row in chosen:
        for _ in range(200):
            text = Print(
                str(rng.randint(10, 99)), 0, 0, rng.uniform(*_SMALL), _dark(rng), rng.uniform(1, 5)
            )
            text = replace(
                text,
                x=column * tile_size + rng.uniform(8, tile_size - text.width - 8),
                y=row * tile_size + rng.uniform(4, tile_size - 1.3 * text.size - 4),
            )
            if not any(_overlaps(text, shape) for shape in shapes):
                break
        prints.append(text)
    return tuple(prints)


def _overlaps(text: Print, shape: Shape) -> bool:
    reach = shape.radius + 6
    return (
        text.x - reach < shape.x < text.x + text.width + reach
        and text.y - reach < shape.y < text.y + 1.3 * text.size + reach
    )


def _light(rng: random.Random) -> RGB:
    return (rng.randint(190, 255), rng.randint(190, 255), rng.randint(190, 255))


def _dark(rng: random.Random) -> RGB:
    return (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60))
