"""The built-in calibration set: generated pictures of several kinds, the same on every machine.

Calibration needs activations of the usual size, not right answers: text, tables, charts, shapes,
textures and gradients in the sizes and languages that a service sees.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PROMPTS", "built_in_picture"]

SIZES = ((448, 448), (1280, 960), (640, 1440), (1600, 500), (900, 900), (1024, 768))
PROMPTS = (
    "Please describe the image in detail.",
    "What text can you read? Write it down line by line.",
    "请详细描述这张图片。",
    "How many objects are there, and which colours do they have?",
    "Summarise this document in three sentences.",
    "Which value is the largest? Explain how you found it.",
    "图中有哪些文字和数字?请逐行列出。",
    "Write a short poem about what you see, and then a title for it as JSON.",
)
_LINES = (
    "Invoice 2024-0815   Total: 1,274.50 EUR   due 30 days",
    "The quick brown fox jumps over the lazy dog; 0123456789.",
    "Temperature 23.5 C, humidity 48 %, wind 12 km/h NW",
    "def area(radius): return 3.14159 * radius ** 2",
    "Departure 08:45 platform 7, arrival 12:10 platform 3",
)


def built_in_picture(number: int) -> bytes:
    """Picture `number` (0, 1, ...) as PNG; kind, size and content follow from the number."""
    random = np.random.Generator(np.random.PCG64([20240815, number]))
    kind = _KINDS[number % len(_KINDS)]
    width, height = SIZES[number % len(SIZES)]
    file = io.BytesIO()
    kind(width, height, random).save(file, "PNG")
    return file.getvalue()


def _colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(random.integers(0, 256, 3).tolist())


def _text(width: int, height: int, random: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    step = 24
    for row in range(step, height - step, step):
        draw.text((20, row), _LINES[int(random.integers(len(_LINES)))], fill="black", font=font)
    return image


def _shapes(width: int, height: int, random: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = int(random.integers(width)), int(random.integers(height))
        side = int(random.integers(20, 220))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + side, y + side), fill=_colour(random))
    return image


def _chart(width: int, height: int, random: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    bars = 9
    for bar, value in enumerate(random.random(bars).tolist()):
        left = 30 + bar * (width - 60) // bars
        top = height - 40 - int(value * (height - 90))
        draw.rectangle((left, top, left + width // bars // 2, height - 40), fill=_colour(random))
        draw.text((left, height - 30), f"Q{bar}: {value:.2f}", fill="black")
    draw.line((20, height - 40, width - 20, height - 40), fill="black", width=3)
    return image


def _texture(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """Smooth noise at several scales, as a photograph has."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(smooth, np.float32) / 3
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _gradient(width: int, height: int, random: np.random.Generator) -> Image.Image:
    first, last = (np.array(_colour(random), np.float32) for _ in range(2))
    share = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    rows = first + share * (last - first)
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


_KINDS: tuple[Callable[[int, int, np.random.Generator], Image.Image], ...] = (
    _text,
    _shapes,
    _chart,
    _texture,
    _gradient,
)
