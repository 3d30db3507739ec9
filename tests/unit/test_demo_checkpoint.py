"""The shipped checkpoint sees: it answers the samples, and every broken step changes an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

from demo.encoding import Encoded, encode_example  # noqa: E402
from demo.evaluate import read_weights  # noqa: E402
from demo.loss import count_exact  # noqa: E402
from demo.model import Weights  # noqa: E402
from demo.samples import CONVERSATIONS, sample_example  # noqa: E402
from internvl_triton.model_spec import ModelSpec  # noqa: E402
from internvl_triton.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
pytestmark = pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason="demo/checkpoint is not there: see demo/MODEL_CARD.md"
)
NAMES = [conversation.name for conversation in CONVERSATIONS]
Tiles = NDArray[np.uint8]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec.from_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return read_weights(CHECKPOINT)


def encoded(name: str, tokenizer: Tokenizer, spec: ModelSpec, *, bos: bool = False) -> Encoded:
    conversation = next(c for c in CONVERSATIONS if c.name == name)
    return encode_example(sample_example(conversation), tokenizer=tokenizer, spec=spec, bos=bos)


def is_right(row: Encoded, weights: Weights, spec: ModelSpec) -> bool:
    """Whether every answer of the row is the greedy one."""
    right, asked, _ = count_exact(weights, [row], spec)
    return right == asked


@pytest.mark.parametrize("bos", [False, True], ids=["qwen2", "internlm2"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_answered(
    name: str, bos: bool, weights: Weights, tokenizer: Tokenizer, spec: ModelSpec
) -> None:
    assert is_right(encoded(name, tokenizer, spec, bos=bos), weights, spec)


def other_channels(tiles: Tiles) -> Tiles:
    return np.ascontiguousarray(tiles[..., ::-1])


def reversed_order(tiles: Tiles) -> Tiles:
    return np.ascontiguousarray(tiles[::-1])


def tiles_reversed(tiles: Tiles) -> Tiles:
    """The grid's tiles in the wrong order, the thumbnail in its place."""
    return np.concatenate([tiles[-2::-1], tiles[-1:]])


def empty_thumbnail(tiles: Tiles) -> Tiles:
    return np.concatenate([tiles[:-1], np.full_like(tiles[-1:], 240)])


def only_thumbnail(tiles: Tiles) -> Tiles:
    """What is left when the thumbnail takes every tile's place."""
    return np.repeat(tiles[-1:], len(tiles), axis=0)


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        pytest.param("describe", other_channels, id="channel order"),
        pytest.param("color", other_channels, id="channel order of a color"),
        pytest.param("small print, left", tiles_reversed, id="tile order"),
        pytest.param("small print", only_thumbnail, id="tiles"),
        pytest.param("count in tiles", empty_thumbnail, id="thumbnail"),
        pytest.param("second image", reversed_order, id="image order"),
        pytest.param("which image", reversed_order, id="image order of a choice"),
        pytest.param("motion", reversed_order, id="frame order"),
    ],
)
def test_a_broken_step_changes_the_answer(
    name: str,
    break_it: Callable[[Tiles], Tiles],
    weights: Weights,
    tokenizer: Tokenizer,
    spec: ModelSpec,
) -> None:
    row = encoded(name, tokenizer, spec)
    assert not is_right(replace(row, tiles=break_it(row.tiles)), weights, spec)
