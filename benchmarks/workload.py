"""What is asked in a load run: conversation number i of a workload is always the same.

A mix is a list of cases, each with a weight:

    448x448          a picture of that size               1920x1080:3      three times as often
    tiles=7          a picture of 7 tiles                 2@448x448        two pictures
    video=8          a clip of 8 frames                   text             no picture
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.lengths import Lengths
from benchmarks.pictures import clip, tiled_size, unique_jpeg
from benchmarks.questions import Question, read_questions
from internvl_triton.errors import InvalidRequest
from internvl_triton.tiling import count_tiles

__all__ = ["Case", "Conversation", "FileWorkload", "GeneratedWorkload", "Workload"]

_PICTURE_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
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
        form = r"(?:(\d+)@)?(?:(\d+)x(\d+)|tiles=(\d+)|video=(\d+)|(text))(?::(\d+(?:\.\d+)?))?"
        found = re.fullmatch(form, text)
        if not found or (found[1] and (found[5] or found[6])):
            raise InvalidRequest(
                f"{text!r} is no case of a mix; give 448x448, tiles=7, 2@448x448, video=8 or text, "
                "each with a weight behind a colon if it is not 1"
            )
        count, width, height, tiles, frames, _, weight = found.groups()
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

    distinct: this many different pictures of each size, again and again; 0: all are different.
    max_tiles: sent with every request if given.
    """

    mix: tuple[Case, ...]
    seed: int = 0
    turns: int = 1
    prompt_words: Lengths = _PROMPT_WORDS
    output_tokens: Lengths = _OUTPUT_TOKENS
    distinct: int = 0
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        if not sum(case.weight for case in self.mix) > 0:
            raise InvalidRequest("the mix has no case with a weight")

    def conversation(self, number: int) -> Conversation:
        random = np.random.default_rng([self.seed, number])
        weights = np.array([case.weight for case in self.mix])
        case = self.mix[random.choice(len(self.mix), p=weights / weights.sum())]
        images: tuple[bytes, ...] = ()
        num_tiles = case.num_frames
        if case.size:
            first = (number % self.distinct if self.distinct else number) * case.num_images
            base = (self.seed << 32) + first
            images = tuple(unique_jpeg(*case.size, base + k) for k in range(case.num_images))
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
            videos=(clip(case.num_frames, number % 4),) if case.num_frames else (),
            num_images=case.num_images + case.num_frames,
            num_tiles=num_tiles,
            sampling=tuple(sampling.items()),
        )


@dataclass(frozen=True)
class FileWorkload:
    """Questions of somebody else's: over and over, in an order drawn by `seed`."""

    questions: tuple[tuple[str, tuple[bytes, ...]], ...]
    seed: int = 0
    output_tokens: Lengths = _OUTPUT_TOKENS

    @classmethod
    def of_directory(cls, folder: Path, **options: Any) -> FileWorkload:
        """One question about each picture of `folder`. Raises InvalidRequest without pictures."""
        files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in _PICTURE_FILES)
        if not files:
            raise InvalidRequest(f"{folder} holds no picture ({', '.join(sorted(_PICTURE_FILES))})")
        prompt = "Describe the picture."
        return cls(tuple((prompt, (file.read_bytes(),)) for file in files), **options)

    @classmethod
    def of_jsonl(cls, path: Path, **options: Any) -> FileWorkload:
        """Prompts and pictures of a file as `questions.py` reads it. Raises InvalidRequest."""
        return cls(tuple(_plain(question) for question in read_questions(path)), **options)

    def conversation(self, number: int) -> Conversation:
        turn, place = divmod(number, len(self.questions))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.questions))
        prompt, images = self.questions[order[place]]
        length = self.output_tokens.draw(np.random.default_rng([self.seed, number]))
        return Conversation((prompt,), (length,), images, (), len(images), _tiles(images))


def _plain(question: Question) -> tuple[str, tuple[bytes, ...]]:
    request = question.request
    if request.text_input is None or request.videos:
        raise InvalidRequest("a load run takes questions with `prompt` and `images` only")
    return request.text_input, tuple(request.images)


def _tiles(images: Sequence[bytes]) -> int:
    import io

    from PIL import Image

    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    return sum(count_tiles(*s, max_tiles=12, tile_size=448, use_thumbnail=True) for s in sizes)


def _prompt(random: np.random.Generator, words: Lengths) -> str:
    return " ".join(random.choice(_WORDS, words.draw(random)).tolist())
