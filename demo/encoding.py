"""An example as what the model sees: tiles and token ids, and what it should say.

Tiles come from the project's `tile_image`, ids from its `build_prompt`: training and serving see
the same input. All branches of an example share one prefix (system message and pictures) and one
row of tokens; `segments` keep them from seeing each other.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.dialogue import Branch, Example
from demo.drawing import DIGITS, draw_labels, draw_scene, through_jpeg
from demo.scene import COLORS, DIRECTIONS, KINDS, PLACES, Scene, direction_of
from internvl_triton.media import packed_pixels
from internvl_triton.model_spec import ModelSpec
from internvl_triton.prompt import (
    Conversation,
    ImageRef,
    Part,
    Turn,
    VideoRef,
    Visual,
    build_prompt,
)
from internvl_triton.tiling import choose_grid, tile_image
from internvl_triton.tokenizer import Tokenizer

__all__ = ["BOS", "IGNORE", "Answer", "Encoded", "TileLabels", "conversation_of", "encode_example"]

IGNORE = -100
_LEGIBLE = 24.0  # font size, in pixels of a tile
BOS = -1  # stands for InternLM2's <s>, which the Qwen2 vocabulary does not have


@dataclass(frozen=True)
class TileLabels:
    """What every visual token shows; 0 = background, IGNORE = not asked.

    color, kind: int64 (num_tiles, tokens). digit: int64 (num_tiles, tokens, 4), for the token's
    four patches, 1 + index into DIGITS; none in a thumbnail that squeezes or shrinks it too much.
    """

    color: NDArray[np.int64]
    kind: NDArray[np.int64]
    digit: NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """labels[begin:end] of one row are this answer and its end token.

    words: places in the row, each with a text that names what should be known there. First, where
    the question says what it is about ("red", else "left") or at its last token, the answer (or the
    exchange's `seen`); then, behind every shape of the answer, before its number and behind the
    name of an image, what is left of the sentence.
    """

    kind: str
    question: str
    text: str
    begin: int
    end: int
    words: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Encoded:
    """One row. int64 (n,) each; ids >= vocab_size are visual tokens, counted from 0.

    labels: the token that should follow, IGNORE outside answers.
    segments: 0 for the shared prefix, b + 1 for branch b.
    sources: (n, 3), for every visual token the number of its image or frame, IGNORE if there is
    only one; the number of its tile in that; both from 0; and in a clip's later frames the index
    into DIRECTIONS of the movement. IGNORE for all other tokens.
    """

    tiles: NDArray[np.uint8]
    tile_labels: TileLabels
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    labels: NDArray[np.int64]
    answers: tuple[Answer, ...]
    sources: NDArray[np.int64]


def encode_example(
    example: Example,
    *,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    bos: bool,
    labels: bool = False,
    rng: random.Random | None = None,
) -> Encoded:
    """`bos`: put BOS in front, as the InternLM2 layout does. `rng`: now and then go via JPEG.

    labels: False leaves every visual token unasked; drawing what it shows takes time.
    """
    max_tiles = 1 if example.media == "video" else spec.max_tiles
    tiles, tile_labels = [], []
    for scene in example.scenes:
        image = draw_scene(scene)
        if rng and rng.random() < 0.3:
            image = through_jpeg(image, rng.randint(80, 97))
        tiles.append(
            tile_image(
                packed_pixels(image),
                max_tiles=max_tiles,
                tile_size=spec.tile_size,
                use_thumbnail=spec.use_thumbnail,
            )
        )
        tile_labels.append(
            _tile_labels(scene, len(tiles[-1]), max_tiles, spec)
            if labels
            else _unasked(len(tiles[-1]), spec)
        )
    counts = [len(group) for group in tiles]
    rows = [_branch_ids(branch, example, counts, tokenizer, spec) for branch in example.branches]
    size = spec.tile_size
    none = np.empty((0, size, size, 3), np.uint8)
    row = _one_row(rows, bos, tokenizer)
    return Encoded(
        np.concatenate([none, *tiles]),
        _concatenated(tile_labels, spec),
        *row,
        _sources((row[0] - spec.llm.vocab_size) // spec.tokens_per_tile, counts, example),
    )


def _sources(tile: NDArray[np.int64], counts: list[int], example: Example) -> NDArray[np.int64]:
    """See `Encoded`. tile: of every token, negative where it is not visual."""
    sources = np.full((len(tile), 3), IGNORE)
    visual = tile >= 0
    image_of = np.repeat(np.arange(len(counts)), np.array(counts, int))
    number_in = np.array([number for count in counts for number in range(count)], int)
    sources[visual, 1] = number_in[tile[visual]]
    if len(counts) > 1:
        sources[visual, 0] = image_of[tile[visual]]
    if example.media == "video":
        moving = visual & (sources[:, 0] > 0)
        sources[moving, 2] = list(DIRECTIONS).index(direction_of(example.scenes))
    return sources


def conversation_of(example: Example, branch: Branch) -> Conversation:
    """The branch as a request's conversation, ending before the last answer."""
    turns = []
    for number, exchange in enumerate(branch):
        media = _media(example) if number == 0 else ()
        turns += [
            Turn("user", (*media, exchange.question)),
            Turn("assistant", (exchange.answer,)),
        ]
    return Conversation(tuple(turns[:-1]))


def _media(example: Example) -> tuple[Part, ...]:
    """Pictures in front of the question, named as the service names them."""
    if not example.scenes:
        return ()
    if example.media == "video":
        return (VideoRef(0),)
    if len(example.scenes) == 1:
        return (ImageRef(0), "\n")
    parts: list[Part] = []
    for index in range(len(example.scenes)):
        parts += [f"Image-{index + 1}: ", ImageRef(index), "\n"]
    return tuple(parts)


_Row = tuple[list[int], list[tuple[int, int]], Branch]


def _branch_ids(
    branch: Branch, example: Example, counts: list[int], tokenizer: Tokenizer, spec: ModelSpec
) -> _Row:
    """Ids of the whole branch, and the [begin, end) of its answers (with their end tokens)."""
    visuals = [Visual(count, (1, 1)) for count in counts]
    groups = [visuals] if example.media == "video" else [[visual] for visual in visuals]
    ids: list[int] = []
    spans = []
    for length in range(1, len(branch) + 1):
        prompt = build_prompt(
            conversation_of(example, branch[:length]),
            groups,
            tokenizer=tokenizer,
            tokens_per_tile=spec.tokens_per_tile,
            vocab_size=spec.llm.vocab_size,
        ).input_ids.tolist()
        if prompt[: len(ids)] != ids:
            raise RuntimeError(
                f"the answer {branch[length - 2].answer!r} has other ids as a part of the prompt "
                "than as an answer; its words must not join the line break before them"
            )
        answer = [*tokenizer.encode(branch[length - 1].answer), tokenizer.end_id]
        ids = prompt + answer
        spans.append((len(prompt), len(ids)))
    return ids, spans, branch


def _words(
    row: list[int], answer: tuple[int, int], asked: int, text: str, tokenizer: Tokenizer
) -> tuple[tuple[int, str], ...]:
    """See `Answer.words`. asked: where the question begins; answer: as in `Answer`."""

    def ids_of(*texts: str) -> set[int]:
        return {tokenizer.encode(each)[0] for each in texts}

    begin, end = answer
    colors, kinds, digits = (
        ids_of(*texts)
        for texts in (
            [f" {color}" for color in COLORS],
            [f" {kind}" for kind in KINDS],
            "0123456789",
        )
    )
    (space,), (colon,) = ids_of(" "), ids_of(":")
    asks = colors | kinds | ids_of(*(f" {place}" for place in PLACES), "1", "2")
    question = range(begin, asked, -1)
    about = [k for k in question if row[k] in colors] + [k for k in question if row[k] in asks]
    words = [(about[0] if about else begin, text)]
    for place in range(begin + 1, end):
        token, following = row[place], row[place + 1]
        names_image = token in digits and following == colon
        if token in kinds or (token == space and following in digits) or names_image:
            rest = tokenizer.token_bytes.join(row[place + 1 : end + 1])
            words.append((place, rest.decode().partition(".")[0]))
    return tuple(words)


def _one_row(
    rows: list[_Row], bos: bool, tokenizer: Tokenizer
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    tuple[Answer, ...],
]:
    """Shared prefix, then every branch, each counting its positions from the prefix's end.

    Without branches the row is empty: only its tiles are looked at.
    """
    if not rows:
        nothing = np.empty(0, np.int64)
        return nothing, nothing, nothing, nothing, ()
    shared = min(spans[0][0] - 1 for _, spans, _ in rows)
    while any(ids[:shared] != rows[0][0][:shared] for ids, _, _ in rows):
        shared -= 1
    out: list[int] = [BOS] * bos + rows[0][0][:shared]
    positions = list(range(len(out)))
    segments = [0] * len(out)
    labels = [IGNORE] * len(out)
    answers = []
    for number, (ids, spans, branch) in enumerate(rows):
        offset = len(out) - shared
        out += ids[shared:]
        positions += range(bos + shared, bos + len(ids))
        segments += [number + 1] * (len(ids) - shared)
        labels += [IGNORE] * (len(ids) - shared)
        asked = len(out) - len(ids) + shared
        for (begin, end), exchange in zip(spans, branch, strict=True):
            # The token before predicts the answer's first one.
            begin, end = begin + offset - 1, end + offset - 1
            labels[begin:end] = out[begin + 1 : end + 1]
            seen = exchange.answer if exchange.seen is None else exchange.seen
            words = _words(out, (begin, end), asked, seen, tokenizer)
            answers.append(
                Answer(exchange.kind, exchange.question, exchange.answer, begin, end, words)
            )
            asked = end
    arrays = (np.array(values, np.int64) for values in (out, positions, segments, labels))
    ids_, positions_, segments_, labels_ = arrays
    return ids_, positions_, segments_, labels_, tuple(answers)


def _tile_labels(scene: Scene, num_tiles: int, max_tiles: int, spec: ModelSpec) -> TileLabels:
    maps = draw_labels(scene)
    grid = choose_grid(scene.width, scene.height, max_tiles=max_tiles, tile_size=spec.tile_size)
    half = spec.tile_size // 2  # half the resolution is enough, and four times faster
    side = spec.vision.patches_per_side // 2
    # Of what a thumbnail shows; digits that it squeezes are none.
    legible = _LEGIBLE * scene.height / spec.tile_size if grid.columns == grid.rows else math.inf
    digits_of_thumbnail = draw_labels(scene, smallest_print=legible).digit

    def tiled(image: Image.Image, thumbnail: Image.Image) -> NDArray[np.uint8]:
        big = np.asarray(image.resize((grid.columns * half, grid.rows * half), 0))
        cut = big.reshape(grid.rows, half, grid.columns, half).swapaxes(1, 2)
        parts = [cut.reshape(-1, half, half)]
        if num_tiles > grid.num_tiles:
            parts.append(np.asarray(thumbnail.resize((half, half), 0))[None])
        return np.concatenate(parts)

    def cells(maps_: NDArray[np.uint8], cells_per_side: int, classes: int) -> NDArray[np.int64]:
        """The class with most pixels; IGNORE where it shows, but too little to be told."""
        pixels = half // cells_per_side
        cut = maps_.reshape(len(maps_), cells_per_side, pixels, cells_per_side, pixels)
        counts = np.stack([(cut == k + 1).sum((2, 4)) for k in range(classes)], -1)
        most = counts.max(-1) / pixels**2
        return np.where(most > 0.15, counts.argmax(-1) + 1, np.where(most > 0.02, IGNORE, 0))

    digit = cells(tiled(maps.digit, digits_of_thumbnail), 2 * side, len(DIGITS))
    digit = digit.reshape(num_tiles, side, 2, side, 2).swapaxes(2, 3)
    return TileLabels(
        cells(tiled(maps.color, maps.color), side, len(COLORS)).reshape(num_tiles, -1),
        cells(tiled(maps.kind, maps.kind), side, len(KINDS)).reshape(num_tiles, -1),
        digit.reshape(num_tiles, side * side, 4),
    )


def _unasked(num_tiles: int, spec: ModelSpec) -> TileLabels:
    unasked = np.full((num_tiles, spec.tokens_per_tile), IGNORE)
    return TileLabels(unasked, unasked, np.repeat(unasked[..., None], 4, -1))


def _concatenated(labels: list[TileLabels], spec: ModelSpec) -> TileLabels:
    none = np.empty((0, spec.tokens_per_tile), np.int64)
    return TileLabels(
        np.concatenate([none, *(label.color for label in labels)]),
        np.concatenate([none, *(label.kind for label in labels)]),
        np.concatenate([none[..., None].repeat(4, -1), *(label.digit for label in labels)]),
    )
