"""Questions for benchmarks: from a JSONL file, or generated with pictures.

One JSON object a line: `prompt` (or `messages`, a list of chat messages), and optionally `images`
and `videos` (files, relative to the JSONL file), `sampling_parameters` and the right `answer`.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from internvl_triton.errors import InvalidRequest
from internvl_triton.preprocessing import Request

__all__ = ["Question", "generate_questions", "read_questions"]

_FIELDS = {"prompt", "messages", "images", "videos", "sampling_parameters", "answer"}
# width x height: 1, 3 (two tiles and the thumbnail) and 3 tiles
_SIZES = ((448, 448), (900, 450), (450, 900))
_PROMPTS = (
    "What is in the picture?",
    "Which colour is the largest shape?",
    "How many shapes are there?",
    "Please describe the image shortly.",
)


@dataclass(frozen=True)
class Question:
    request: Request
    answer: str | None = None  # the right one, if somebody knows it


def read_questions(path: Path) -> list[Question]:
    """Raises InvalidRequest, with the line, for what is no question or a file that is missing."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    questions = [
        _question(line, path.parent, f"{path.name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise InvalidRequest(f"{path} holds no question; give one JSON object a line")
    return questions


def generate_questions(count: int, *, seed: int = 0) -> list[Question]:
    """`count` questions about pictures of coloured boxes, the same ones for the same seed."""
    return [
        Question(
            Request(
                text_input=_PROMPTS[index % len(_PROMPTS)],
                images=(_picture(*_SIZES[index % len(_SIZES)], seed=[seed, index]),),
            )
        )
        for index in range(count)
    ]


def _question(line: str, folder: Path, where: str) -> Question:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not valid JSON ({error})") from error
    if not isinstance(fields, dict) or set(fields) - _FIELDS:
        given = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InvalidRequest(f"{where} has {given}; allowed: {', '.join(sorted(_FIELDS))}")
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest(f"{where} must have exactly one of prompt and messages")
    request = Request(
        text_input=fields.get("prompt"),
        messages=_as_json(fields.get("messages")),
        images=[_read(folder / name, where) for name in fields.get("images", [])],
        videos=[_read(folder / name, where) for name in fields.get("videos", [])],
        sampling_parameters=_as_json(fields.get("sampling_parameters")),
    )
    return Question(request, fields.get("answer"))


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"{where} names {path.name}, which cannot be read: {error.strerror}"
        ) from error


def _picture(width: int, height: int, *, seed: list[int]) -> bytes:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), _colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 6))):
        x, y = int(random.integers(width)), int(random.integers(height))
        size = int(random.integers(30, 200))
        shape = draw.rectangle if random.random() < 0.5 else draw.ellipse
        shape((x, y, x + size, y + size), fill=_colour(random))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(random.integers(0, 256, 3).tolist())
