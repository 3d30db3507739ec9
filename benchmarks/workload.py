"""What is asked in a load run: conversation number i of a workload is always the same.

A mix is a list of cases, each with a weight:

    448x448          a picture of that size               1920x1080:3      three times as often
    tiles=7          a picture of 7 tiles                 2@448x448        two pictures
    video=8          a clip of 8 frames                   text             no picture
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.lengths import Lengths
from benchmarks.pictures import clip, tiled_size, unique_jpeg
from benchmarks.questions import parse_question, read_lines
from internvl_triton.errors import InvalidRequest
from internvl_triton.tiling import count_tiles

__all__ = ["Case", "Conversation", "FileWorkload", "GeneratedWorkload", "Seed", "Workload"]

Seed = int | tuple[int, ...]  # whole numbers below 2^32

_PICTURE_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SUFFIXES = ", ".join(sorted(_PICTURE_FILES))
_MOST_TILES = 40  # that our preprocessing cuts one picture into, for any model
_KEYS = {"answer", "images", "prompt"}
_PROMPT_WORDS, _OUTPUT_TOKENS = Lengths("16"), Lengths("32")
_WORDS = ("the", "picture", "shows", "what", "color", "number", "shape", "left", "right", "above",
          "small", "count", "describe", "read", "every", "word", "table", "street", "red", "green",
          "blue", "between", "behind")  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Turns about the same media: each is asked after the answer to the one before.

    prompts, max_tokens: one per turn. num_images counts the frames of clips as well.
    """

    prompts: tuple[str, ...]
    max_tokens: tuple[int, ...]
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()
    num_images: int = 0
    num_tiles: int = 0
    sampling: tuple[tuple[str, Any], ...] = ()


class Workload(Protocol):
    def conversation(self, number: int) -> Conversation:
        """The `number`-th conversation, from 0."""
        ...


@dataclass(frozen=True)
class Case:
    """One kind of request of a mix."""

    name: str
    weight: float
    size: tuple[int, int] | None = None
    num_images: int = 0
    num_frames: int = 0

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises InvalidRequest for what is no case."""
        form = r"(?:(\d{1,3})@)?(?:(\d{1,5})x(\d{1,5})|tiles=(\d{1,2})|video=(\d{1,3})|(text))"
        form += r"(?::(\d+(?:\.\d+)?))?"
        found = re.fullmatch(form, text)
        if not found or (found[1] and (found[5] or found[6])):
            raise InvalidRequest(
                f"{text!r} is no case of a mix; give 448x448, tiles=7, 2@448x448, video=8 or text, "
                "each with a weight behind a colon if it is not 1"
            )
        count, width, height, tiles, frames, _, weight = found.groups()
        if count and int(count) < 1:
            raise InvalidRequest(f"{text!r}: a request has at least 1 picture; text has none")
        size = None
        if width:
            size = int(width), int(height)
            if not all(0 < side <= 20000 for side in size):
                raise InvalidRequest(f"{text!r}: sides go from 1 to 20000 pixels")
        elif tiles:
            if int(tiles) != 1 and not 3 <= int(tiles) <= 13:
                raise InvalidRequest(f"{text!r}: one picture has 1 tile, or 3 to 13")
            size = tiled_size(int(tiles))
        if frames and int(frames) < 1:
            raise InvalidRequest(f"{text!r}: a clip has at least 1 frame")
        return cls(
            name=text.rpartition(":")[0] if weight else text,
            weight=float(weight or 1),
            size=size,
            num_images=int(count or 1) if size else 0,
            num_frames=int(frames or 0),
        )


@dataclass(frozen=True)
class GeneratedWorkload:
    """Pictures, prompts and lengths drawn by `seed` and the conversation's number.

    seed: pictures and clips of other seeds are others, to the pixel; (seed, k) is one for the k-th
        part of a run, which no other seed has.
    distinct: only the media of so many conversations, again and again; 0: all are different.
    max_tiles: sent with every request that has pictures, if given.
    """

    mix: tuple[Case, ...]
    seed: Seed = 0
    turns: int = 1
    prompt_words: Lengths = _PROMPT_WORDS
    output_tokens: Lengths = _OUTPUT_TOKENS
    distinct: int = 0
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what cannot be drawn or no server would take."""
        if not 0 < sum(case.weight for case in self.mix) < float("inf"):
            raise InvalidRequest("the mix has no case with a weight; give one with 1, or with none")
        _random(self.seed)
        if self.turns < 1 or self.distinct < 0:
            raise InvalidRequest(
                f"turns is {self.turns} and distinct {self.distinct}; give at least 1 and 0"
            )
        if self.max_tiles is not None and not 1 <= self.max_tiles <= _MOST_TILES:
            raise InvalidRequest(
                f"max_tiles is {self.max_tiles}; give 1 to {_MOST_TILES}, or leave it out for the "
                "model's own"
            )

    def conversation(self, number: int) -> Conversation:
        random = _random(self.seed, number)
        weights = np.array([case.weight for case in self.mix])
        case = self.mix[random.choice(len(self.mix), p=weights / weights.sum())]
        key = (*_numbers(self.seed), number % self.distinct if self.distinct else number)
        images: tuple[bytes, ...] = ()
        num_tiles = case.num_frames
        if case.size:
            images = tuple(unique_jpeg(*case.size, *key, k) for k in range(case.num_images))
            num_tiles = case.num_images * count_tiles(
                *case.size, max_tiles=self.max_tiles or 12, tile_size=448, use_thumbnail=True
            )
        sampling = {"max_tiles": self.max_tiles} if self.max_tiles and images else {}
        if case.num_frames:
            sampling["num_frames"] = case.num_frames
        return Conversation(
            prompts=tuple(_prompt(random, self.prompt_words) for _ in range(self.turns)),
            max_tokens=tuple(self.output_tokens.draw(random) for _ in range(self.turns)),
            images=images,
            videos=(clip(case.num_frames, *key),) if case.num_frames else (),
            num_images=case.num_images + case.num_frames,
            num_tiles=num_tiles,
            sampling=tuple(sampling.items()),
        )


@dataclass(frozen=True)
class FileWorkload:
    """Questions of somebody else's: over and over, in an order drawn by `seed`."""

    questions: tuple[tuple[str, tuple[bytes, ...]], ...]
    seed: Seed = 0
    output_tokens: Lengths = _OUTPUT_TOKENS

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what is no seed."""
        _random(self.seed)

    @classmethod
    def of_directory(cls, folder: Path, **options: Any) -> FileWorkload:
        """One question about each picture of `folder`. Raises InvalidRequest without pictures."""
        try:
            files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in _PICTURE_FILES)
            pictures = [file.read_bytes() for file in files]
        except OSError as error:
            raise InvalidRequest(
                f"{error.filename} cannot be read: {error.strerror}; give a directory of pictures "
                f"({_SUFFIXES})"
            ) from error
        if not files:
            raise InvalidRequest(f"{folder} holds no picture; give a directory with {_SUFFIXES}")
        for file, picture in zip(files, pictures, strict=True):
            _picture_size(picture, str(file))
        return cls(tuple(("Describe the picture.", (data,)) for data in pictures), **options)

    @classmethod
    def of_jsonl(cls, path: Path, **options: Any) -> FileWorkload:
        """One JSON object a line: `prompt`, and optionally `images` as `questions.py` reads them.

        `answer` may be there and is not used. Raises InvalidRequest, with the line.
        """
        path = Path(path)
        lines = read_lines(path)
        return cls(tuple(_question(*line, path.parent) for line in lines), **options)

    def conversation(self, number: int) -> Conversation:
        turn, place = divmod(number, len(self.questions))
        order = _random(self.seed, turn).permutation(len(self.questions))
        prompt, images = self.questions[order[place]]
        length = self.output_tokens.draw(_random(self.seed, number))
        sizes = [_picture_size(image, "a picture") for image in images]
        num_tiles = sum(
            count_tiles(*size, max_tiles=12, tile_size=448, use_thumbnail=True) for size in sizes
        )
        return Conversation((prompt,), (length,), images, (), len(images), num_tiles)


def _question(fields: Any, where: str, folder: Path) -> tuple[str, tuple[bytes, ...]]:
    if isinstance(fields, dict) and not set(fields) <= _KEYS:
        raise InvalidRequest(
            f"{where} has {', '.join(sorted(set(fields) - _KEYS))}; a load run takes "
            f"{', '.join(sorted(_KEYS))} only: leave the others out"
        )
    request = parse_question(fields, folder, where).request()
    assert request.text_input is not None  # there is exactly one of prompt and messages
    for number, image in enumerate(request.images, start=1):
        _picture_size(image, f"{where}: image {number}")
    return request.text_input, tuple(request.images)


def _picture_size(data: bytes, what: str) -> tuple[int, int]:
    """Width and height. Raises InvalidRequest for what is no picture; `what` names it."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures and odd metadata
            return Image.open(io.BytesIO(data)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest(
            f"{what} is no picture that can be opened ({len(data)} bytes, which start with "
            f"{data[:8].hex() or 'nothing'}); give one of {_SUFFIXES}"
        ) from error


def _numbers(seed: Seed) -> tuple[int, ...]:
    return (seed,) if isinstance(seed, int) else seed


def _random(seed: Seed, *numbers: int) -> np.random.Generator:
    """Another one for each seed and numbers. Raises InvalidRequest for what is no seed."""
    key = _numbers(seed)
    if not all(0 <= number < 2**32 for number in key):
        raise InvalidRequest(f"the seed is {seed}; give whole numbers from 0 to {2**32 - 1}")
    return np.random.default_rng([len(key), *key, *numbers])


def _prompt(random: np.random.Generator, words: Lengths) -> str:
    return " ".join(random.choice(_WORDS, words.draw(random)).tolist())
