"""Questions for benchmarks, from a JSONL file.

One JSON object a line, UTF-8: `prompt` (or `messages`, a list of chat messages), and optionally
`images` and `videos` (a file or a list of them, relative to the JSONL file), `sampling_parameters`
and the right `answer`. `benchmarks/vqa.py` reads the files of visual question answering, which use
other names.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from internvl_triton.errors import InvalidRequest, InvalidSampling
from internvl_triton.preprocessing import Request
from internvl_triton.sampling import SamplingParams

__all__ = [
    "Question",
    "QuestionLine",
    "parse_question",
    "read_lines",
    "read_questions",
    "wrong_value",
]

_FIELDS = {"prompt", "messages", "images", "videos", "sampling_parameters", "answer"}


@dataclass(frozen=True)
class Question:
    request: Request
    answer: str | None = None  # the right one, if somebody knows it


@dataclass(frozen=True)
class QuestionLine:
    """A checked line of a file. images, videos: names of files in `folder` that can be read."""

    where: str
    folder: Path
    prompt: str | None
    messages: str | None
    images: tuple[str, ...]
    videos: tuple[str, ...]
    sampling_parameters: str | None
    answer: str | None

    def request(self) -> Request:
        """What to ask; reads the files. Raises InvalidRequest if one has gone since the check."""
        return Request(
            text_input=self.prompt,
            messages=self.messages,
            images=[self._read(name) for name in self.images],
            videos=[self._read(name) for name in self.videos],
            sampling_parameters=self.sampling_parameters,
        )

    def check_files(self) -> None:
        """Raises InvalidRequest, naming it, for a file that cannot be read."""
        for name in (*self.images, *self.videos):
            self._read(name, size=1)

    def _read(self, name: str, size: int = -1) -> bytes:
        path = self.folder / name
        try:
            with _open_file(path) as file:
                return file.read(size)
        except (OSError, ValueError) as error:  # ValueError: no file has such a name
            raise InvalidRequest(
                f"{self.where} names {name}, which cannot be read: "
                f"{error.strerror if isinstance(error, OSError) else error} ({path.absolute()}); "
                "put the file there or correct the line: names are relative to the JSONL file"
            ) from error


def read_questions(path: Path) -> list[Question]:
    """Raises InvalidRequest, with the line, for what is no question or a file that is missing."""
    path = Path(path)
    lines = [parse_question(fields, path.parent, where) for fields, where in read_lines(path)]
    return [Question(line.request(), line.answer) for line in lines]


def read_lines(path: Path) -> list[tuple[Any, str]]:
    """What each line of a JSONL file holds, and where it stands, for messages.

    Raises InvalidRequest: the file cannot be read, is empty or not UTF-8, or a line is not JSON.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequest(
            f"{path.name}, line {number} is not UTF-8 (byte 0x{data[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
    values = []
    # str.splitlines() would also split at U+2028 and others, which JSON allows in a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # refuses an unpaired surrogate
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} is not valid JSON ({error})") from error
        values.append((value, where))
    if not values:
        raise InvalidRequest(f"{path} holds no question; give one JSON object a line")
    return values


def parse_question(
    fields: Any, folder: Path, where: str, names: Mapping[str, str] | None = None
) -> QuestionLine:
    """One line's object, checked with its files, which are in `folder`.

    names: what the file calls a field, for messages, if not by the name above.

    Raises InvalidRequest: an unknown key, a value of a wrong type, a file that cannot be read.
    """
    if not isinstance(fields, dict) or set(fields) - _FIELDS:
        given = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InvalidRequest(f"{where} has {given}; allowed: {', '.join(sorted(_FIELDS))}")
    called = {key: key for key in _FIELDS} | dict(names or {})
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest(f"{where} must have exactly one of {called['prompt']} and messages")
    for key in ("prompt", "answer"):
        if key in fields and not isinstance(fields[key], str):
            raise wrong_value(where, called[key], fields[key], "a text")
    messages = fields.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(part, dict) for part in messages):
        raise wrong_value(where, "messages", messages, "a list of objects with role and content")
    line = QuestionLine(
        where=where,
        folder=folder,
        prompt=fields.get("prompt"),
        messages=json.dumps(messages) if "messages" in fields else None,
        images=_file_names(fields.get("images", []), called["images"], where),
        videos=_file_names(fields.get("videos", []), called["videos"], where),
        sampling_parameters=_sampling(fields, where),
        answer=fields.get("answer"),
    )
    line.check_files()
    return line


def wrong_value(where: str, key: str, given: Any, allowed: str) -> InvalidRequest:
    """The error for a key of a line that has a value of a wrong type."""
    shown = json.dumps(given, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InvalidRequest(f"{where}: {key} is {shown}; it must be {allowed}")


def _file_names(given: Any, key: str, where: str) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        allowed = "the name of a file or a list of names; leave it out if there is none"
        raise wrong_value(where, key, given, allowed)
    return tuple(names)


def _sampling(fields: dict[str, Any], where: str) -> str | None:
    if "sampling_parameters" not in fields:
        return None
    given = fields["sampling_parameters"]
    if not isinstance(given, dict):
        allowed = 'an object such as {"max_tokens": 64}'
        raise wrong_value(where, "sampling_parameters", given, allowed)
    try:
        SamplingParams.from_values(given)
    except InvalidSampling as error:
        raise InvalidSampling(f"{where}: {error}") from error
    return json.dumps(given)


def _open_file(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise OSError(errno.EINVAL, "it is not a file")
    return path.open("rb")
