"""A scene as a picture, and as maps that say what every pixel shows."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.scene import COLORS, KINDS, Print, Scene, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DIGITS", "LabelMaps", "draw_labels", "draw_scene", "through_jpeg"]


# The last digit of a number, or the one before it: which one it is can be seen where it stands.
DIGITS = (*"0123456789", *(f"{digit}_" for digit in "0123456789"))


@dataclass(frozen=True)
class LabelMaps:
    """Images in mode L, 0 = background: 1 + index into COLORS, into KINDS, into DIGITS."""

    color: Image.Image
    kind: Image.Image
    digit: Image.Image


def draw_scene(scene: Scene) -> Image.Image:
    """The picture, RGB, scene.width x scene.height."""
    if scene.texture is not None:
        return _texture(scene)
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(draw, shape, shape.rgb)
    for text in _prints(scene):
        for x, digit in _digit_places(text):
            draw.text((x, text.y), digit, fill=text.rgb, font=_font(round(text.size)))
    return image


def draw_labels(scene: Scene, *, smallest_print: float = 0.0) -> LabelMaps:
    """Maps of the picture's size. A digit's label fills its bounding box.

    smallest_print: font size in pixels of the picture; smaller print is background.
    """
    maps = [Image.new("L", (scene.width, scene.height), 0) for _ in range(3)]
    color, kind, digit_map = map(ImageDraw.Draw, maps)
    for shape in scene.shapes:
        _draw_shape(color, shape, 1 + list(COLORS).index(shape.color))
        _draw_shape(kind, shape, 1 + KINDS.index(shape.kind))
    for text in _prints(scene):
        if text.size < smallest_print:
            continue
        places = _digit_places(text)
        for index, (x, digit) in enumerate(places):
            box = digit_map.textbbox((x, text.y), digit, font=_font(round(text.size)))
            name = digit if index == len(places) - 1 else f"{digit}_"
            digit_map.rectangle(box, fill=1 + DIGITS.index(name))
    return LabelMaps(*maps)


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The picture as it comes out of a JPEG file of this quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _prints(scene: Scene) -> list[Print]:
    return [*([scene.number] if scene.number else []), *scene.small_prints]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fill: Any) -> None:
    x, y, r = shape.x, shape.y, shape.radius
    if shape.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "square":
        half = 0.85 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape.kind == "triangle":
        draw.polygon([(x, y - r), (x - 0.9 * r, y + 0.8 * r), (x + 0.9 * r, y + 0.8 * r)], fill)
    else:
        draw.polygon([_star_corner(x, y, r, corner) for corner in range(10)], fill)


def _star_corner(x: float, y: float, radius: float, corner: int) -> tuple[float, float]:
    angle = math.pi * (corner / 5 - 0.5)
    reach = radius if corner % 2 == 0 else 0.45 * radius
    return x + reach * math.cos(angle), y + reach * math.sin(angle)


def _digit_places(text: Print) -> list[tuple[float, str]]:
    """Left edge of every digit."""
    places, x = [], text.x
    for digit in text.text:
        places.append((x, digit))
        x += _font(round(text.size)).getlength(digit) + text.spacing
    return places


@lru_cache(maxsize=256)
def _font(size: int) -> Any:
    load: Callable[..., Any] = ImageFont.load_default  # the font that is part of Pillow
    return load(size)


def _texture(scene: Scene) -> Image.Image:
    generator = np.random.Generator(np.random.PCG64(scene.texture))
    side = int(generator.integers(3, 25))
    gray, hue = generator.random((side, side, 1)), generator.random((side, side, 3))
    share = 0.7 * generator.random()  # photographs are seldom colourful
    blobs: NDArray[np.uint8] = (256 * (gray * (1 - share) + hue * share)).astype(np.uint8)
    return Image.fromarray(blobs).resize((scene.width, scene.height), Image.Resampling.BICUBIC)
