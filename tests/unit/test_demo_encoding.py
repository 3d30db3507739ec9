"""Training rows are what the service would see: reference tiles, reference prompt, one answer."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.batch import SUBJECTS, subjects
from demo.dialogue import EXAMPLE_KINDS, Example, make_example
from demo.drawing import DIGITS, draw_scene
from demo.encoding import BOS, IGNORE, Encoded, encode_example
from demo.model import demo_config
from demo.scene import COLORS, DIRECTIONS, PLACES, random_scene
from demo.scene import KINDS as KINDS_OF_SHAPES
from demo.vocabulary import demo_vocabulary
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tokenizer import Tokenizer, load_tokenizer
from tests.reference import reference_ids, reference_prompt, reference_tiles

KINDS = sorted(EXAMPLE_KINDS)
TALKING = [kind for kind in KINDS if kind != "crowd"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    demo_vocabulary().write_qwen2(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def spec(tokenizer: Tokenizer) -> ModelSpec:
    return ModelSpec.from_config(demo_config(len(tokenizer)))


def encoded(
    kind: str, tokenizer: Tokenizer, spec: ModelSpec, *, bos: bool = False
) -> tuple[Example, Encoded]:
    example = make_example(random.Random(f"encoding {kind}"), kind, tile_size=448)
    return example, encode_example(example, tokenizer=tokenizer, spec=spec, bos=bos)


def pictures_text(example: Example) -> str:
    if not example.scenes:
        return ""
    if example.media == "images" and len(example.scenes) == 1:
        return "<image>\n"
    name = "Frame" if example.media == "video" else "Image-"
    return "".join(f"{name}{k + 1}: <image>\n" for k in range(len(example.scenes)))


@pytest.mark.parametrize("kind", TALKING)
def test_every_branch_is_the_reference_prompt(
    kind: str, tokenizer: Tokenizer, spec: ModelSpec, directory: Path
) -> None:
    example, row = encoded(kind, tokenizer, spec)
    max_tiles = 1 if example.media == "video" else 12
    counts = [len(reference_tiles(draw_scene(s), max_num=max_tiles)) for s in example.scenes]
    ids = np.where(row.ids >= spec.llm.vocab_size, tokenizer.special_id("<IMG_CONTEXT>"), row.ids)
    for number, branch in enumerate(example.branches, start=1):
        seen = (row.segments == 0) | (row.segments == number)
        asked = [pictures_text(example) + branch[0].question, *(e.question for e in branch[1:])]
        answered = [exchange.answer for exchange in branch]
        history = list(zip(asked[:-1], answered[:-1], strict=True))
        prompt = reference_prompt(history, asked[-1], counts)
        whole = reference_ids(directory, prompt + answered[-1] + "<|im_end|>")
        assert ids[seen].tolist() == whole
        assert row.positions[seen].tolist() == list(range(len(whole)))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_reference_tiles(kind: str, tokenizer: Tokenizer, spec: ModelSpec) -> None:
    example, row = encoded(kind, tokenizer, spec)
    max_tiles = 1 if example.media == "video" else 12
    tiles = [reference_tiles(draw_scene(scene), max_num=max_tiles) for scene in example.scenes]
    assert row.tiles.shape[1:] == (448, 448, 3)
    assert np.array_equal(row.tiles, np.concatenate(tiles) if tiles else row.tiles[:0])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers(kind: str, tokenizer: Tokenizer, spec: ModelSpec) -> None:
    _, row = encoded(kind, tokenizer, spec)
    covered = np.zeros(len(row.labels), bool)
    for answer in row.answers:
        labels = row.labels[answer.begin : answer.end]
        assert labels[-1] == tokenizer.end_id
        assert tokenizer.token_bytes.join(labels[:-1].tolist()) == answer.text.encode()
        # The row goes on with what the label says, so one pass predicts the whole answer.
        assert row.ids[answer.begin + 1 : answer.end + 1].tolist() == labels.tolist()
        covered[answer.begin : answer.end] = True
    assert (row.labels[~covered] == IGNORE).all()


def test_bos_only_shifts_the_row(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    _, without = encoded("one_tile", tokenizer, spec)
    _, row = encoded("one_tile", tokenizer, spec, bos=True)
    assert row.ids[0] == BOS
    assert row.segments[0] == 0
    assert np.array_equal(row.ids[1:], without.ids)
    assert np.array_equal(row.positions[1:], without.positions + 1)
    assert np.array_equal(row.labels[1:], without.labels)


def test_dense_labels_lie_where_the_shape_is(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    rng = random.Random(3)
    checked = 0
    while checked < 10:
        example = make_example(rng, "one_tile", tile_size=448)
        scene = example.scenes[0]
        if scene.width != 448 or not scene.shapes:
            continue
        checked += 1
        row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False, labels=True)
        labels = row.tile_labels
        for shape in scene.shapes:
            token = int(shape.y // 28) * 16 + int(shape.x // 28)
            assert labels.color[0, token] > 0
            assert labels.kind[0, token] > 0
        digits = labels.digit[0].reshape(16, 16, 4)
        found = names_of(digits)
        number = scene.number.text if scene.number else ""
        assert found == ({f"{number[0]}_", number[1]} if number else set())


@pytest.mark.parametrize(("columns", "rows"), [(2, 1), (1, 3), (2, 2)])
def test_a_thumbnail_shows_no_digits_that_it_squeezes_or_shrinks(
    columns: int, rows: int, tokenizer: Tokenizer, spec: ModelSpec
) -> None:
    scene = random_scene(
        random.Random(1), tile_size=448, columns=columns, rows=rows, num_shapes=1, number=True,
        num_small_prints=1,
    )  # fmt: skip
    example = Example((scene,), "images", ())
    row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False, labels=True)
    *tiles, thumbnail = row.tile_labels.digit
    assert scene.number
    assert scene.small_prints
    number, small = (
        {f"{text[0]}_", text[1]} for text in (scene.number.text, scene.small_prints[0].text)
    )
    assert names_of(np.stack(tiles)) == number | small
    assert names_of(thumbnail) == (number if columns == rows else set())


def names_of(digits: NDArray[np.int64]) -> set[str]:
    return {DIGITS[value - 1] for value in np.unique(digits) if value > 0}


def test_without_labels_nothing_is_asked_of_a_token(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    example = make_example(random.Random(3), "two_tiles", tile_size=448)
    row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False)
    asked = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False, labels=True)
    for name in ("color", "kind", "digit"):
        labels = getattr(row.tile_labels, name)
        assert labels.shape == getattr(asked.tile_labels, name).shape
        assert (labels == IGNORE).all()
    assert np.array_equal(row.ids, asked.ids)


@pytest.mark.parametrize("kind", ["one_tile", "two_images", "clip", "text"])
def test_the_word_of_a_question_stands_in_it(
    kind: str, tokenizer: Tokenizer, spec: ModelSpec
) -> None:
    """The last colour, else shape or place; without one, the token before the answer."""
    names = {*COLORS, *KINDS_OF_SHAPES, *PLACES, "1", "2"}
    found = 0
    for seed in range(6):
        example = make_example(random.Random(seed), kind, tile_size=448)
        row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False)
        for answer in row.answers:
            (place, text), *later = answer.words
            if answer.kind not in ("count", "turns") and "There is no" not in answer.text:
                assert text == answer.text
            named = [word for word in re.findall(r"\w+", answer.question) if word in names]
            if named:
                found += 1
                token = tokenizer.token_bytes.join([row.ids[place]]).decode()
                colors = [word for word in named if word in COLORS]
                assert token.strip() == (colors or named)[-1]
                assert place < answer.begin
            else:
                assert place == answer.begin
            for place, rest in later:
                said = tokenizer.token_bytes.join(row.ids[answer.begin + 1 : place + 1]).decode()
                assert re.fullmatch(rf"{re.escape(said + rest)}(\. .*)?\.", answer.text)
                assert said.endswith((*KINDS_OF_SHAPES, " ", "Image-1", "Image-2"))
    assert found or kind in ("clip", "text")


def test_what_must_be_seen_to_count_is_every_shape(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    for seed in range(6):
        example = make_example(random.Random(seed), "one_tile", tile_size=448)
        row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=False)
        for answer in row.answers:
            if answer.kind == "count":
                ((_, text),) = answer.words[:1]
                assert {word for word in text.split() if word in COLORS} == {
                    shape.color for shape in example.scenes[0].shapes
                }


def test_sources_are_the_numbers_of_images_frames_and_tiles(
    tokenizer: Tokenizer, spec: ModelSpec
) -> None:
    for kind in ("one_tile", "two_tiles", "small_print", "two_images", "clip", "text"):
        example = make_example(random.Random(2), kind, tile_size=448)
        row = encode_example(example, tokenizer=tokenizer, spec=spec, bos=True)
        visual = row.ids >= spec.llm.vocab_size
        assert (row.sources[~visual] == IGNORE).all()
        of_tiles = row.sources[visual].reshape(-1, spec.tokens_per_tile, 3)
        assert (of_tiles == of_tiles[:, :1]).all()
        images, tiles, moves = of_tiles[:, 0].T.tolist()
        if len(example.scenes) == 1:
            assert images == [IGNORE] * len(row.tiles)
            assert tiles == list(range(len(row.tiles)))
        else:
            assert images == list(range(len(example.scenes)))  # of one tile each
            assert tiles == [0] * len(example.scenes)
        if kind == "clip":
            direction = example.branches[0][0].answer.rstrip(".").split()[-1]
            assert [list(DIRECTIONS)[move] for move in moves[1:]] == [direction] * (len(tiles) - 1)
            moves = moves[:1]
        assert set(moves) <= {IGNORE}


def test_subjects_are_what_an_answer_names() -> None:
    none = dict.fromkeys(range(len(SUBJECTS)), IGNORE)

    def named(**found: int) -> list[int]:
        order = ("color", "kind", "direction", "tens", "ones", "image")
        return list(
            {**none, **{order.index(name): index for name, index in found.items()}}.values()
        )

    assert subjects("A red circle and a blue square and the number 42.") == named(
        color=0, kind=0, tens=4, ones=2
    )
    assert subjects("There is no star.") == named(kind=3)
    assert subjects("Image-2.") == named(image=1)
    assert subjects("The blue star moves down.") == named(color=2, kind=3, direction=3)
    assert subjects("You are welcome.") == named()
