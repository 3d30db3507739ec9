"""Ten pictures, a short clip, and what the demo model should answer about them.

    python -m demo.samples

Writes JPEG files, an MP4 and `samples.json` into demo/samples. Each one is there for a reason,
given in its `shows`: what breaks its answer when it breaks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from demo.dialogue import Example, Exchange
from demo.drawing import draw_scene
from demo.scene import COLORS, Print, Scene, Shape
from internvl_triton.media import frame_indices

__all__ = [
    "CLIP",
    "CONVERSATIONS",
    "PICTURES",
    "Conversation",
    "clip_scenes",
    "main",
    "sample_example",
    "write_clip",
    "write_samples",
]

_TILE = 448
_INK = (25, 30, 45)


def _scene(
    background: tuple[int, int, int],
    *shapes: tuple[str, str, int, int, int],
    size: tuple[int, int] = (_TILE, _TILE),
    arrangement: Any = "row",
    number: tuple[int, int, int] | None = None,
    small: tuple[tuple[int, int, int], ...] = (),
) -> Scene:
    """shapes: (colour, kind, x, y, radius). number: (digits, x, size); small: (digits, x, y)."""
    width, height = size
    return Scene(
        width=width,
        height=height,
        background=background,
        arrangement=arrangement,
        shapes=tuple(
            Shape(color, kind, x, y, radius, COLORS[color]) for color, kind, x, y, radius in shapes
        ),
        number=Print(str(number[0]), number[1], 0.77 * height, number[2], _INK) if number else None,
        small_prints=tuple(Print(str(digits), x, y, 28, _INK, 3) for digits, x, y in small),
    )


_CREAM, _SKY, _MINT, _ROSE = (250, 245, 225), (222, 236, 250), (224, 244, 230), (250, 228, 232)

PICTURES: dict[str, Scene] = {
    "circle-and-square": _scene(
        _CREAM, ("red", "circle", 120, 160, 58), ("blue", "square", 330, 190, 60),
        number=(42, 180, 52),
    ),
    "three-in-a-row": _scene(
        _SKY, ("green", "triangle", 80, 120, 46), ("yellow", "star", 224, 200, 50),
        ("purple", "circle", 368, 140, 46),
    ),
    "top-and-bottom": _scene(
        _MINT, ("orange", "star", 240, 85, 58), ("blue", "circle", 200, 245, 56),
        arrangement="column",
    ),
    "one-star": _scene(_ROSE, ("yellow", "star", 224, 170, 70)),
    "only-a-number": _scene(_CREAM, number=(87, 180, 54)),
    "blue-then-red": _scene(
        _SKY, ("blue", "triangle", 110, 150, 60), ("red", "triangle", 330, 180, 60),
        number=(15, 60, 48),
    ),
    "wide": _scene(
        _ROSE, ("purple", "square", 190, 150, 62), ("green", "circle", 700, 180, 64),
        size=(2 * _TILE, _TILE), number=(63, 540, 54),
    ),
    "small-print": _scene(
        _MINT, ("red", "star", 270, 300, 120), ("yellow", "circle", 640, 360, 125),
        size=(2 * _TILE, 2 * _TILE), small=((58, 690, 760),),
    ),
    "small-print-twice": _scene(
        _CREAM, ("blue", "square", 230, 260, 60), ("orange", "triangle", 1010, 240, 62),
        size=(3 * _TILE, _TILE), small=((62, 90, 90), (94, 1180, 380)),
    ),
    "tall": _scene(
        _SKY, ("green", "star", 210, 160, 62), ("purple", "triangle", 260, 450, 62),
        size=(_TILE, 2 * _TILE), arrangement="column", number=(29, 170, 54),
    ),
}  # fmt: skip
CLIP = "moving-circle"


@dataclass(frozen=True)
class Conversation:
    """turns: (question, right answer). images: names of PICTURES; video: CLIP or None."""

    name: str
    shows: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    video: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


_WHAT, _LEFT = "What is in the image?", "Which shape is on the left?"

CONVERSATIONS = (
    Conversation(
        "describe", "the whole pipeline; red and blue tell the channels apart",
        ((_WHAT, "A red circle and a blue square and the number 42."),),
        ("circle-and-square",),
    ),
    Conversation(
        "count", "counting", (("Count the shapes.", "Three shapes."),),
        ("three-in-a-row",),
    ),
    Conversation(
        "shape", "shapes", (("What shape is yellow?", "The yellow shape is a star."),),
        ("three-in-a-row",),
    ),
    Conversation(
        "color", "colours, and so the order of the channels",
        (("What color is the circle?", "The circle is blue."),), ("top-and-bottom",),
    ),
    Conversation(
        "top", "rows of visual tokens",
        (("Which shape is at the top?", "An orange star."),), ("top-and-bottom",),
    ),
    Conversation(
        "left and right", "columns of visual tokens, and a second turn",
        ((_LEFT, "A blue triangle."), ("And on the right?", "A red triangle.")),
        ("blue-then-red",),
    ),
    Conversation("single", "a single shape", ((_WHAT, "A yellow star."),), ("one-star",)),
    Conversation(
        "number", "reading",
        (("What number is written?", "The number is 87."),), ("only-a-number",),
    ),
    Conversation(
        "wide", "two tiles and a thumbnail",
        ((_WHAT, "A green circle and a purple square and the number 63."),), ("wide",),
    ),
    Conversation(
        "tall", "two tiles, one above the other",
        ((_WHAT, "A green star and a purple triangle and the number 29."),), ("tall",),
    ),
    Conversation(
        "small print", "tiles: the thumbnail does not resolve it",
        (("What does the small print say?", "The small print says 58."),), ("small-print",),
    ),
    Conversation(
        "count in tiles", "counting in a picture of four tiles",
        (("How many shapes are there?", "Two shapes."),), ("small-print",),
    ),
    Conversation(
        "top in tiles", "the thumbnail: no tile shows both shapes",
        (("Which shape is at the top?", "A green star."),), ("tall",),
    ),
    Conversation(
        "small print, left", "the order of tiles",
        (("What does the small print on the left say?", "The small print says 62."),),
        ("small-print-twice",),
    ),
    Conversation(
        "small print, right", "the order of tiles",
        (("What does the small print on the right say?", "The small print says 94."),),
        ("small-print-twice",),
    ),
    Conversation(
        "second image", "the order of images",
        (("What is in Image-2?", "A red circle and a blue square and the number 42."),),
        ("one-star", "circle-and-square"),
    ),
    Conversation(
        "which image", "the order of images",
        (("Which image shows a yellow star?", "Image-2."),), ("only-a-number", "one-star"),
    ),
    Conversation(
        "motion", "the order of frames",
        (("Which way does the circle move?", "The red circle moves right."),),
        video=CLIP, sampling={"num_frames": 4},
    ),
    Conversation(
        "text", "no picture at all",
        (("Who are you?", "I am a tiny demo model with the InternVL2.5 architecture."),),
    ),
)  # fmt: skip


def clip_scenes(count: int = 24) -> list[Scene]:
    """Frames of CLIP: a red circle goes from left to right."""
    return [
        _scene(_MINT, ("red", "circle", round(70 + 300 * frame / (count - 1)), 210, 58))
        for frame in range(count)
    ]


def sample_example(conversation: Conversation) -> Example:
    """The conversation as an example of one branch; a clip as the frames that the service takes."""
    branch = tuple(Exchange(conversation.name, *turn) for turn in conversation.turns)
    if conversation.video is None:
        scenes = tuple(PICTURES[name] for name in conversation.images)
        return Example(scenes, "images", (branch,))
    frames = clip_scenes()
    chosen = frame_indices(len(frames), conversation.sampling["num_frames"])
    return Example(tuple(frames[index] for index in chosen), "video", (branch,))


def write_clip(path: Path, *, frames_per_second: int = 12) -> None:
    """An MP4 file (H.264) of two seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second))
        stream.width, stream.height, stream.pix_fmt = _TILE, _TILE, "yuv420p"
        # One thread: the same bytes every time.
        stream.options = {"crf": "20", "threads": "1", "preset": "slow"}
        for scene in clip_scenes():
            frame = av.VideoFrame.from_ndarray(np.asarray(draw_scene(scene)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_samples(directory: Path) -> None:
    """All pictures, the clip and samples.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, scene in PICTURES.items():
        draw_scene(scene).save(directory / f"{name}.jpg", quality=95)
    write_clip(directory / f"{CLIP}.mp4")
    described = [
        {
            "name": conversation.name,
            "shows": conversation.shows,
            "images": [f"{name}.jpg" for name in conversation.images],
            "video": f"{conversation.video}.mp4" if conversation.video else None,
            "sampling_parameters": conversation.sampling,
            "turns": [{"question": q, "answer": a} for q, a in conversation.turns],
        }
        for conversation in CONVERSATIONS
    ]
    text = json.dumps(described, indent=2) + "\n"
    (directory / "samples.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    target = Path(__file__).parent / "samples"
    parser.add_argument("--directory", type=Path, default=target, help="default: demo/samples")
    arguments = parser.parse_args()
    write_samples(arguments.directory)
    print(f"{len(PICTURES)} pictures and a clip in {arguments.directory}")  # noqa: T201


if __name__ == "__main__":
    main()
