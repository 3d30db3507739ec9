"""The calibration set: a directory of pictures and prompts, or the built-in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.calibration.pictures import PROMPTS, built_in_picture
from internvl_triton.errors import BuildFailed
from internvl_triton.preprocessing import Request

__all__ = ["BUILT_IN_SAMPLES", "Sample", "calibration_files", "read_samples"]

BUILT_IN_SAMPLES = 32  # as many as NVIDIA's quantize.py takes for AWQ
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FIELDS = {"prompt", "messages", "images", "answer"}


@dataclass(frozen=True)
class Sample:
    """A question and, if it is known, its answer: the model then also sees what it would say."""

    request: Request
    answer: str | None
    where: str


def calibration_files(directory: Path | None) -> list[Path]:
    """What the calibration set is made of, for finding out whether it has changed."""
    if directory is None:
        return []
    return [*_jsonl_files(directory), *_pictures(directory)]


def read_samples(directory: Path | None, *, limit: int) -> Iterator[Sample]:
    """The first `limit` samples of `directory`; None has the built-in ones.

    A directory holds one `*.jsonl` file, one JSON object a line: `prompt` (or `messages`), and
    optionally `images` (files, relative to the directory) and `answer`. Without such a file, every
    picture in it is asked one of the built-in prompts.

    Raises BuildFailed, with the line, for what is none of that.
    """
    if directory is None:
        yield from _built_in(min(limit, BUILT_IN_SAMPLES))
        return
    if not directory.is_dir():
        raise BuildFailed(f"CALIBRATION={directory} is no directory; give one with pictures")
    files, pictures = _jsonl_files(directory), _pictures(directory)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BuildFailed(f"CALIBRATION={directory} has several .jsonl files: {names}; leave one")
    if files:
        yield from _from_lines(files[0], limit)
    elif pictures:
        for number, picture in enumerate(pictures[:limit]):
            prompt = PROMPTS[number % len(PROMPTS)]
            yield Sample(Request(text_input=prompt, images=[_read(picture)]), None, picture.name)
    else:
        raise BuildFailed(
            f"CALIBRATION={directory} has neither a .jsonl file nor pictures "
            f"({', '.join(_PICTURES)})"
        )


def _built_in(count: int) -> Iterator[Sample]:
    """Every eighth sample has no picture: a service answers such questions, too."""
    for number in range(count):
        images = [] if number % 8 == 7 else [built_in_picture(number)]
        request = Request(text_input=PROMPTS[number % len(PROMPTS)], images=images)
        yield Sample(request, None, f"built-in sample {number}")


def _from_lines(file: Path, limit: int) -> Iterator[Sample]:
    found = 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BuildFailed(f"{where} is not valid JSON ({error})") from error
        yield _sample(fields, file.parent, where)
        found += 1
        if found == limit:
            return
    if not found:
        raise BuildFailed(f"{file} is empty; give one JSON object a line")


def _sample(fields: Any, folder: Path, where: str) -> Sample:
    if not isinstance(fields, dict) or set(fields) - _FIELDS:
        given = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise BuildFailed(f"{where} has {given}; allowed: {', '.join(sorted(_FIELDS))}")
    if ("prompt" in fields) == ("messages" in fields):
        raise BuildFailed(f"{where} must have exactly one of prompt and messages")
    images, answer = fields.get("images", []), fields.get("answer")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BuildFailed(f"{where}: images must be a list of file names, not {images!r}")
    if not isinstance(answer, str | None):
        raise BuildFailed(f"{where}: answer must be a text, not {answer!r}")
    request = Request(
        text_input=fields.get("prompt"),
        messages=json.dumps(fields["messages"]) if "messages" in fields else None,
        images=[_read(folder / name, where) for name in images],
    )
    return Sample(request, answer, where)


def _read(picture: Path, where: str = "CALIBRATION") -> bytes:
    try:
        return picture.read_bytes()
    except OSError as error:
        raise BuildFailed(
            f"{where} names {picture.name}, which cannot be read: {error.strerror}"
        ) from error


def _jsonl_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def _pictures(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.suffix.lower() in _PICTURES)
