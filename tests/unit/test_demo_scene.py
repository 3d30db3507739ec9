"""The demo's scenes: the same for the same seed, and every answer is what the pixels show."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from demo.dialogue import EXAMPLE_KINDS, QUESTION_KINDS, Exchange, make_example
from demo.drawing import draw_labels, draw_scene
from demo.scene import COLORS, DIRECTIONS, KINDS, Scene
from internvl_triton.tiling import choose_grid

COUNTS = {"no": 0, "one": 1, "two": 2, "three": 3}
# Share of its bounding box that a shape fills: pi/4, 1, 1/2, and a star's.
FILL = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "star": 0.32}

NAMED = rf"({'|'.join(COLORS)}) ({'|'.join(KINDS)})"


def seen(image: Image.Image) -> dict[str, tuple[str, float, float]]:
    """Colour -> (shape, x, y), found in the pixels alone."""
    pixels = np.asarray(image).astype(int)
    found = {}
    for color, rgb in COLORS.items():
        mask = np.abs(pixels - rgb).max(-1) <= 13
        if mask.sum() < 100:
            continue
        ys, xs = np.nonzero(mask)
        box = (np.ptp(xs) + 1) * (np.ptp(ys) + 1)
        fill = mask.sum() / box
        kind = min(FILL, key=lambda name: abs(FILL[name] - fill))
        found[color] = (kind, xs.mean(), ys.mean())
    return found


def named(text: str) -> set[tuple[str, str]]:
    """Every "red circle" in a text."""
    return set(re.findall(NAMED, text))


def check(exchange: Exchange, scene: Scene, shapes: dict[str, tuple[str, float, float]]) -> bool:
    """Assert that the answer holds; False when it is not about what `seen` finds."""
    question, answer = exchange.question, exchange.answer
    if exchange.kind == "describe":
        told = re.findall(NAMED, answer)
        assert told == [(color, shapes[color][0]) for color in COLORS if color in shapes]
        digits = re.findall(r"\d+", answer)
        assert digits == ([scene.number.text] if scene.number else [])
    elif exchange.kind == "count":
        assert COUNTS[answer.split()[0].lower()] == len(shapes)
    elif exchange.kind == "shape":
        color = next(word for word in question.rstrip("?").split() if word in COLORS)
        if color in shapes:
            assert answer == f"The {color} shape is a {shapes[color][0]}."
        else:
            assert answer == f"There is no {color} shape."
    elif exchange.kind == "color":
        kind = next(word for word in question.rstrip("?").split() if word in KINDS)
        colors = [color for color, shape in shapes.items() if shape[0] == kind]
        assert answer == (f"The {kind} is {colors[0]}." if colors else f"There is no {kind}.")
        assert len(colors) < 2
    elif exchange.kind == "position":
        axis, choose = {
            "left?": (1, min),
            "right?": (1, max),
            "top?": (2, min),
            "bottom?": (2, max),
        }[question.split()[-1]]
        color = choose(shapes, key=lambda name: shapes[name][axis])
        assert named(answer) == {(color, shapes[color][0])}
    elif exchange.kind == "number":
        assert answer == (
            f"The number is {scene.number.text}." if scene.number else "There is no number."
        )
    else:
        return False
    return True


@pytest.mark.parametrize("kind", ["one_tile", "two_tiles", "small_print"])
def test_answers_are_what_the_pixels_show(kind: str) -> None:
    rng = random.Random(kind)
    checked = 0
    for _ in range(12):
        example = make_example(rng, kind, tile_size=224)
        shapes = seen(draw_scene(example.scenes[0]))
        for branch in example.branches:
            checked += check(branch[0], example.scenes[0], shapes)
    assert checked > 40


def test_pictures_of_a_pair_are_numbered_in_order() -> None:
    rng = random.Random(5)
    for _ in range(20):
        example = make_example(rng, "two_images", tile_size=224)
        for exchange, *_ in example.branches:
            where, shown = exchange.question, exchange.answer
            if exchange.answer.startswith("Image-") and "two images" not in exchange.question:
                where, shown = shown, where
            both = where if "Image-" in where else shown
            parts = re.findall(r"Image-(\d)(?:: (.*?)(?= Image-|$))?", both)
            for number, part in parts:
                shapes = seen(draw_scene(example.scenes[int(number) - 1]))
                told = {(color, shape[0]) for color, shape in shapes.items()}
                assert named(part or shown) <= told
            assert len(parts) == (2 if "two images" in where else 1)


def test_clips_move_the_way_the_answer_says() -> None:
    rng = random.Random(6)
    for _ in range(20):
        example = make_example(rng, "clip", tile_size=224)
        places = [next(iter(seen(draw_scene(scene)).values()))[1:] for scene in example.scenes]
        moved = np.subtract(places[-1], places[0])
        direction = example.branches[0][0].answer.rstrip(".").split()[-1]
        assert np.argmax(np.abs(moved)) == np.argmax(np.abs(DIRECTIONS[direction]))
        assert np.dot(moved, DIRECTIONS[direction]) > 50


def test_a_printed_number_is_drawn() -> None:
    rng = random.Random(7)
    for _ in range(20):
        scene = make_example(rng, "one_tile", tile_size=448).scenes[0]
        if scene.number:
            others = [str(number) for number in range(10, 100) if str(number) != scene.number.text]
            other = replace(scene, number=replace(scene.number, text=rng.choice(others)))
            assert draw_scene(other).tobytes() != draw_scene(scene).tobytes()


@pytest.mark.parametrize("kind", ["two_tiles", "small_print"])
def test_no_number_is_cut_by_the_border_of_two_tiles(kind: str) -> None:
    rng = random.Random(9)
    for _ in range(40):
        scene = make_example(rng, kind, tile_size=448).scenes[0]
        grid = choose_grid(scene.width, scene.height, max_tiles=12, tile_size=448)
        for text in filter(None, [scene.number, *scene.small_prints]):
            alone = replace(scene, shapes=(), number=None, small_prints=(text,))
            digits = np.asarray(
                draw_labels(alone).digit.resize((64 * grid.columns, 64 * grid.rows))
            )
            tiles = (digits > 0).reshape(grid.rows, 64, grid.columns, 64)
            assert tiles.any((1, 3)).sum() == 1


def test_small_print_lies_in_one_tile_and_off_the_shapes() -> None:
    rng = random.Random(8)
    for _ in range(40):
        scene = make_example(rng, "small_print", tile_size=448).scenes[0]
        assert scene.small_prints
        digits = np.asarray(draw_labels(scene).digit) > 0
        tiles = digits.reshape(scene.height // 448, 448, scene.width // 448, 448)
        assert tiles.any((1, 3)).sum() == len(scene.small_prints)
        ink = np.asarray(draw_scene(replace(scene, shapes=())))
        assert (ink[digits] == np.asarray(draw_scene(scene))[digits]).mean() > 0.97


@pytest.mark.parametrize(("kind", "grids"), [("one_tile", {1}), ("two_tiles", {2})])
def test_pictures_have_the_tiles_of_their_kind(kind: str, grids: set[int]) -> None:
    rng = random.Random(9)
    for _ in range(50):
        scene = make_example(rng, kind, tile_size=448).scenes[0]
        grid = choose_grid(scene.width, scene.height, max_tiles=12, tile_size=448)
        assert grid.num_tiles in grids


@pytest.mark.parametrize("kind", EXAMPLE_KINDS)
def test_the_seed_decides(kind: str) -> None:
    one, same, other = (
        make_example(random.Random(seed), kind, tile_size=448) for seed in ("a", "a", "b")
    )
    assert one == same
    assert one != other
    for scene, again in zip(one.scenes, same.scenes, strict=True):
        assert draw_scene(scene).tobytes() == draw_scene(again).tobytes()


def test_every_kind_of_question_is_asked() -> None:
    rng = random.Random(10)
    kinds = {
        exchange.kind
        for kind in EXAMPLE_KINDS
        for _ in range(10)
        for branch in make_example(rng, kind, tile_size=448).branches
        for exchange in branch
    }
    assert kinds == set(QUESTION_KINDS)
