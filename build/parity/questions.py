"""What the artefacts and the reference are asked: text, one tile, a whole picture, a conversation.

The pictures are drawn, not stored; no two colours, sides or quarters of them are alike, so that a
swapped channel, a mirrored tile or a wrong order of tiles changes what is compared.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Question", "verification_questions"]


@dataclass(frozen=True)
class Question:
    """One request in our words and in the reference's.

    prompt: text or chat messages, as `internvl_triton.client` takes them.
    history, text: of the reference's `chat()`, `<image>` at each picture's place.
    """

    name: str
    prompt: str | list[dict[str, Any]]
    text: str
    history: tuple[tuple[str, str], ...] = ()
    pictures: tuple[bytes, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL decodes them."""
        return [Image.open(io.BytesIO(data)) for data in self.pictures]


def verification_questions() -> list[Question]:
    """Four questions: with no picture, one of one tile, a large one, and three in two turns."""
    describe = "Describe the picture in one sentence."
    how_many = "How many shapes are there? Answer with a number."
    compare = "Which of these pictures shows more, and why?"
    return [
        Question("text only", "Why is the sky blue?", "Why is the sky blue?"),
        Question(
            "picture of one tile",
            how_many,
            f"<image>\n{how_many}",
            pictures=(_draw(300, 300, seed=1),),
        ),
        Question(
            "large picture",
            describe,
            f"<image>\n{describe}",
            pictures=(_draw(1280, 960, seed=2),),
        ),
        Question(
            "three pictures in two turns",
            [
                {"role": "user", "content": [{"type": "image"}, _text(how_many)]},
                {"role": "assistant", "content": "Three."},
                {"role": "user", "content": [{"type": "image"}, {"type": "image"}, _text(compare)]},
            ],
            f"Image-2: <image>\nImage-3: <image>\n{compare}",
            history=((f"<image>\n{how_many}", "Three."),),
            pictures=(
                _draw(900, 450, seed=3),
                _draw(200, 610, seed=4),
                _draw(150, 150, seed=5, mode="RGBA"),
            ),
        ),
    ]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _draw(width: int, height: int, *, seed: int, mode: str = "RGB") -> bytes:
    """A PNG: another gradient in each channel, noise, and three shapes."""
    random = np.random.default_rng(seed)
    x = np.linspace(0, 255, width)[None, :]
    y = np.linspace(255, 0, height)[:, None]
    channels = np.broadcast_arrays(x, y, (x + y) / 3)
    noise = random.integers(-20, 21, (height, width, 3))
    pixels = np.clip(np.stack(channels, axis=2) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    for number, colour in enumerate(((230, 30, 20), (20, 200, 60), (30, 40, 220))):
        left, top = random.integers(0, width // 2), random.integers(0, height // 2)
        box = (int(left), int(top), int(left + width // 3), int(top + height // 4))
        (canvas.ellipse, canvas.rectangle, canvas.line)[number](box, fill=colour)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
