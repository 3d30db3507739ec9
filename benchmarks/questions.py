"""Questions for benchmarks, from a JSONL file.

One JSON object a line: `prompt` (or `messages`, a list of chat messages), and optionally `images`
and `videos` (files, relative to the JSONL file), `sampling_parameters` and the right `answer`.
`benchmarks/vqa.py` reads the files of visual question answering, which use other names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_triton.errors import InvalidRequest
from internvl_triton.preprocessing import Request

__all__ = ["Question", "parse_question", "read_lines", "read_questions"]

_FIELDS = {"prompt", "messages", "images", "videos", "sampling_parameters", "answer"}


@dataclass(frozen=True)
class Question:
    request: Request
    answer: str | None = None  # the right one, if somebody knows it


def read_questions(path: Path) -> list[Question]:
    """Raises InvalidRequest, with the line, for what is no question or a file that is missing."""
    path = Path(path)
    return [parse_question(fields, path.parent, where) for fields, where in read_lines(path)]


def read_lines(path: Path) -> list[tuple[Any, str]]:
    """What each line of a JSONL file holds, and where it stands, for messages.

    Raises InvalidRequest: the file cannot be read, is empty, or a line is not JSON.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            values.append((json.loads(line), where))
        except ValueError as error:
            raise InvalidRequest(f"{where} is not valid JSON ({error})") from error
    if not values:
        raise InvalidRequest(f"{path} holds no question; give one JSON object a line")
    return values


def parse_question(fields: Any, folder: Path, where: str) -> Question:
    """One line's object as a question; its files are in `folder`. Raises InvalidRequest."""
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
