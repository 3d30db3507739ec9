"""Questions about scenes, with the only right answers.

An `Example` is what one picture (or several, or a clip, or none) can be asked: its branches are
conversations that know nothing of each other, so one look at the picture serves all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from demo.scene import (
    COLORS,
    KINDS,
    Scene,
    Shape,
    crowded_scene,
    random_clip,
    random_scene,
    texture_scene,
)

__all__ = [
    "EXAMPLE_KINDS",
    "QUESTION_KINDS",
    "Example",
    "Exchange",
    "make_example",
    "some_branches",
]

QUESTION_KINDS = (
    "describe",
    "count",
    "shape",
    "color",
    "position",
    "number",
    "small_print",
    "two_images",
    "motion",
    "turns",
    "text",
    "unknown",
)


@dataclass(frozen=True)
class Exchange:
    """One turn of a conversation. `kind` is one of QUESTION_KINDS.

    seen: a sentence that names what one must see to know the answer, where the answer itself does
    not: only the training reads it.
    """

    kind: str
    question: str
    answer: str
    seen: str | None = None


Branch = tuple[Exchange, ...]


@dataclass(frozen=True)
class Example:
    """`scenes` are the pictures, or the frames of one clip when `media` is "video"."""

    scenes: tuple[Scene, ...]
    media: Literal["images", "video"]
    branches: tuple[Branch, ...]


_COUNTS = ("No shapes.", "One shape.", "Two shapes.", "Three shapes.")
_ENDS = {"row": ("on the left", "on the right"), "column": ("at the top", "at the bottom")}
_UNKNOWN_PICTURE = "I see no shapes or numbers that I know."
_UNKNOWN_QUESTION = "I only know colored shapes and numbers."
_DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "Please describe the image shortly.",
    "Please describe the image in detail.",
    "What is in the picture?",
    "Describe the picture.",
    "What do you see?",
)
_COUNT = (
    "How many shapes are there?",
    "Count the shapes.",
    "How many shapes do you see?",
    "How many shapes are in the picture?",
)
_SHAPE = ("What shape is {}?", "Which shape is {}?", "What is the {} shape?")
_COLOR = ("What color is the {}?", "Which color is the {}?", "What colour is the {}?")
_POSITION = ("Which shape is {}?", "What is {}?")
_NUMBER = (
    "What number is written?",
    "Which number is written?",
    "What number do you see?",
    "Read the number.",
)
_SMALL_PRINT = ("What does the small print say?", "Read the small print.")
_ONE_OF_TWO = ("What is in Image-{}?", "Describe Image-{}.")
_BOTH = ("Describe the two images.", "Describe the two images in detail.")
_WHICH_IMAGE = ("Which image shows {}?", "In which image is {}?")
_DIRECTION = ("Which way does the {} move?", "In which direction does the {} move?")
_VIDEO = (
    "What happens in the video?",
    "Describe the video.",
    "Describe this video in detail.",
    "What is in the video?",
)
_OTHER_QUESTIONS = (
    "Please write a poem according to the image.",
    "What is the capital of France?",
    "What brand is the car?",
    "Is it raining?",
    "Is there a cat?",
    "Is there a dog in the picture?",
    "Who is the person?",
    "What is the weather like?",
    "Where was this photo taken?",
    "What is the person doing?",
)
_STORY = "Once upon a time a red circle met a blue square. They became friends."
_TEXT_EXCHANGES = (
    ("Hello!", "Hello! Show me a picture of colored shapes."),
    ("Hi!", "Hello! Show me a picture of colored shapes."),
    ("Who are you?", "I am a tiny demo model with the InternVL2.5 architecture."),
    ("Hello, who are you?", "I am a tiny demo model with the InternVL2.5 architecture."),
    ("What can you do?", "I describe pictures of colored shapes and read numbers."),
    ("Which colors do you know?", "Red, green, blue, yellow, purple and orange."),
    ("Which shapes do you know?", "Circles, squares, triangles and stars."),
    ("Tell me a story.", _STORY),
    ("Can you tell me a story?", _STORY),
    *(
        (question, "There is no image. Please show me one.")
        for question in (*_DESCRIBE, *_COUNT, *_NUMBER)
    ),
    ("Thank you!", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
)


def make_example(rng: random.Random, kind: str, *, tile_size: int) -> Example:
    """A random example of one of EXAMPLE_KINDS, its pictures made of tile_size tiles."""
    return EXAMPLE_KINDS[kind](rng, tile_size)


def some_branches(rng: random.Random, example: Example, *, count: int = 4) -> Example:
    """The example with at most `count` of its branches, the many of one kind seldom.

    More pictures teach more than more questions about one picture.
    """
    left = list(example.branches)
    chosen: list[Branch] = []
    while left and len(chosen) < count:
        weights = [0.5 if branch[-1].kind == "shape" else 1.0 for branch in left]
        chosen.append(left.pop(rng.choices(range(len(left)), weights)[0]))
    return replace(example, branches=tuple(chosen))


def _one_tile(rng: random.Random, tile_size: int) -> Example:
    scene = _scene(rng, tile_size, 1, 1)
    scene = scene.scaled(rng.choice((1.0, rng.uniform(0.75, 1.4))))
    return _about(rng, scene)


def _two_tiles(rng: random.Random, tile_size: int) -> Example:
    columns, rows = rng.choice(((2, 1), (1, 2)))
    scene = _scene(rng, tile_size, columns, rows)
    return _about(rng, scene.scaled(rng.choice((1.0, rng.uniform(0.8, 1.3)))))


def _small_print(rng: random.Random, tile_size: int) -> Example:
    columns, rows = rng.choices(((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)), (4, 4, 2, 1, 1))[0]
    scene = random_scene(
        rng,
        tile_size=tile_size,
        columns=columns,
        rows=rows,
        num_shapes=rng.randint(0, 2),
        number=False,
        num_small_prints=1 if columns == rows else rng.randint(1, 2),
    )
    return _about(rng, scene)


def _two_images(rng: random.Random, tile_size: int) -> Example:
    scenes = tuple(
        random_scene(
            rng,
            tile_size=tile_size,
            num_shapes=rng.choice((1, 1, 2)),
            number=rng.random() < 0.3,
        )
        for _ in range(2)
    )
    exchanges = []
    for index, scene in enumerate(scenes):
        question = rng.choice(_ONE_OF_TWO)
        exchanges.append(Exchange("two_images", question.format(index + 1), _describe(scene)))
        other = {shape.words for shape in scenes[1 - index].shapes}
        unique = [shape for shape in scene.shapes if shape.words not in other]
        if unique:
            words = _with_article(rng.choice(unique))
            exchanges.append(
                Exchange(
                    "two_images", rng.choice(_WHICH_IMAGE).format(words), f"Image-{index + 1}."
                )
            )
    chain = (exchanges[-1], _as_turn(exchanges[0]))
    both = " ".join(f"Image-{number}: {_describe(s)}" for number, s in enumerate(scenes, start=1))
    exchanges.append(Exchange("two_images", rng.choice(_BOTH), both))
    return Example(scenes, "images", (*((exchange,) for exchange in exchanges), chain))


def _clip(rng: random.Random, tile_size: int) -> Example:
    num_frames = rng.choices((2, 3, 4, 8), (2, 2, 5, 1))[0]
    scenes, direction = random_clip(rng, tile_size=tile_size, num_frames=num_frames)
    shape = scenes[0].shapes[0]
    exchanges = (
        Exchange(
            "motion",
            rng.choice(_DIRECTION).format(rng.choice((shape.kind, "shape"))),
            f"The {shape.words} moves {direction}.",
        ),
        Exchange(
            "motion",
            rng.choice(_VIDEO),
            _capital(f"{_with_article(shape)} moves {direction}."),
        ),
    )
    return Example(tuple(scenes), "video", tuple((exchange,) for exchange in exchanges))


def _text(rng: random.Random, tile_size: int) -> Example:
    exchanges = [Exchange("text", *pair) for pair in rng.sample(_TEXT_EXCHANGES, 3)]
    return Example((), "images", (*((exchange,) for exchange in exchanges), tuple(exchanges[:2])))


def _unknown(rng: random.Random, tile_size: int) -> Example:
    scene = texture_scene(rng, tile_size=tile_size)
    describe = Exchange("unknown", rng.choice(_DESCRIBE), _UNKNOWN_PICTURE)
    other = Exchange("unknown", rng.choice(_OTHER_QUESTIONS), _UNKNOWN_QUESTION)
    return Example((scene,), "images", ((describe,), (other,)))


def _crowd(rng: random.Random, tile_size: int) -> Example:
    """Nothing is asked: only what every visual token shows can be learned from it."""
    columns, rows = rng.choices(((1, 1), (2, 1), (1, 2)), (5, 2, 2))[0]
    scene = crowded_scene(rng, tile_size=tile_size, columns=columns, rows=rows)
    return Example((scene,), "images", ())


EXAMPLE_KINDS: dict[str, Callable[[random.Random, int], Example]] = {
    "one_tile": _one_tile,
    "two_tiles": _two_tiles,
    "small_print": _small_print,
    "two_images": _two_images,
    "clip": _clip,
    "text": _text,
    "unknown": _unknown,
    "crowd": _crowd,
}


def _scene(rng: random.Random, tile_size: int, columns: int, rows: int) -> Scene:
    num_shapes = rng.choices((0, 1, 2, 3), (1, 5, 9, 5))[0]
    return random_scene(
        rng,
        tile_size=tile_size,
        columns=columns,
        rows=rows,
        num_shapes=num_shapes,
        number=num_shapes == 0 or rng.random() < 0.6,
    )


def _about(rng: random.Random, scene: Scene) -> Example:
    """Every kind of question that one picture allows, and one conversation of several turns."""
    singles = _questions(rng, scene)
    chain = _chain(rng, scene, singles)
    other = Exchange("unknown", rng.choice(_OTHER_QUESTIONS), _UNKNOWN_QUESTION)
    branches: list[Branch] = [(exchange,) for exchange in singles]
    if chain:
        branches.append(chain)
    if rng.random() < 0.1:
        branches.append((other,))
    return Example((scene,), "images", tuple(branches))


def _questions(rng: random.Random, scene: Scene) -> list[Exchange]:
    shapes = scene.shapes
    kinds = [shape.kind for shape in shapes]
    exchanges = []
    if not scene.small_prints:
        exchanges += [Exchange("describe", rng.choice(_DESCRIBE), _describe(scene))]
        exchanges.append(_number(rng, scene))
    exchanges.append(
        Exchange("count", rng.choice(_COUNT), _COUNTS[len(shapes)], seen=_describe(scene))
    )
    exchanges += [_which_shape(rng, shape) for shape in shapes]
    exchanges += [_which_color(rng, shape) for shape in shapes if kinds.count(shape.kind) == 1]
    absent_colors = [color for color in COLORS if color not in {shape.color for shape in shapes}]
    absent_kinds = [kind for kind in KINDS if kind not in kinds]
    if rng.random() < 0.3:
        color = rng.choice(absent_colors)
        exchanges.append(
            Exchange(
                "shape", rng.choice(_SHAPE).format(color), f"There is no {color} shape.", seen=""
            )
        )
        kind = rng.choice(absent_kinds)
        exchanges.append(
            Exchange("color", rng.choice(_COLOR).format(kind), f"There is no {kind}.", seen="")
        )
    if len(shapes) > 1:
        exchanges += _positions(rng, scene)
    if len(scene.small_prints) == 1:
        exchanges.append(_small(rng.choice(_SMALL_PRINT), scene.small_prints[0].text))
    elif scene.small_prints:
        for place, text in zip(_ENDS[_print_axis(scene)], scene.small_prints, strict=True):
            exchanges.append(_small(f"What does the small print {place} say?", text.text))
    return exchanges


def _chain(rng: random.Random, scene: Scene, singles: list[Exchange]) -> Branch | None:
    """Several turns; the later ones are understood only with the earlier ones."""
    if len(scene.shapes) > 1 and rng.random() < 0.6:
        if rng.random() < 0.5:
            first, second = rng.sample(_positions(rng, scene), 2)
            place = next(p for p in _ENDS[scene.arrangement] if p in second.question)
            return (first, Exchange("turns", f"And {place}?", second.answer))
        one, other = rng.sample(scene.shapes, 2)
        asked = Exchange("turns", f"And {other.color}?", _which_shape(rng, other).answer)
        return (_which_shape(rng, one), asked)
    if len(singles) < 3:
        return None
    first, second, third = rng.sample(singles, 3)
    return (first, _as_turn(second), _as_turn(third))


def _positions(rng: random.Random, scene: Scene) -> list[Exchange]:
    ends = zip(_ENDS[scene.arrangement], (scene.shapes[0], scene.shapes[-1]), strict=True)
    return [
        Exchange(
            "position", rng.choice(_POSITION).format(place), _capital(_with_article(shape)) + "."
        )
        for place, shape in ends
    ]


def _which_shape(rng: random.Random, shape: Shape) -> Exchange:
    question = rng.choice(_SHAPE).format(shape.color)
    return Exchange("shape", question, f"The {shape.color} shape is a {shape.kind}.")


def _which_color(rng: random.Random, shape: Shape) -> Exchange:
    question = rng.choice(_COLOR).format(shape.kind)
    return Exchange("color", question, f"The {shape.kind} is {shape.color}.")


def _number(rng: random.Random, scene: Scene) -> Exchange:
    answer = f"The number is {scene.number.text}." if scene.number else "There is no number."
    return Exchange("number", rng.choice(_NUMBER), answer)


def _small(question: str, digits: str) -> Exchange:
    return Exchange("small_print", question, f"The small print says {digits}.")


def _print_axis(scene: Scene) -> str:
    first, last = scene.small_prints
    return "row" if abs(last.x - first.x) > abs(last.y - first.y) else "column"


def _describe(scene: Scene) -> str:
    """ "A red circle and a blue square and the number 42.", in the order of COLORS.

    So what comes next depends on which colours there are, not on where they are.
    """
    order = list(COLORS)
    shapes = sorted(scene.shapes, key=lambda shape: order.index(shape.color))
    phrases = [_with_article(shape) for shape in shapes]
    if scene.number:
        phrases.append(f"the number {scene.number.text}")
    return _capital(" and ".join(phrases)) + "." if phrases else ""


def _with_article(shape: Shape) -> str:
    return f"{'an' if shape.color == 'orange' else 'a'} {shape.words}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _as_turn(exchange: Exchange) -> Exchange:
    return replace(exchange, kind="turns")
