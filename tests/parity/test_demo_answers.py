"""The demo model answers its samples, split and rounded, and notices a broken step."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from build import build_engines
from build.demo_checkpoint import demo_checkpoint
from demo import SAMPLES, SampleQuestion, sample_questions
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.tokenizer import load_tokenizer
from tests.demo_pipeline import DemoPipeline, Fault, Tiles
from tests.reference import (
    reference_frames,
    reference_ids,
    reference_prompt,
    reference_tiles,
)

QUESTIONS = {question.name: question for question in sample_questions()}
NAMES = ("demo", "demo-internlm2")
BUILDS = [LLMBuild("bf16", tp_size) for tp_size in (1, 2, 4)] + [
    LLMBuild("int8", 1),
    LLMBuild("int4", 2),
]


@pytest.fixture(scope="module")
def artifacts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo_answers")


def build(name: str, llm: LLMBuild, artifacts_dir: Path) -> Artifacts:
    return build_engines(
        name,
        tp_size=llm.tp_size,
        precision=llm.precision,
        profile="cpu",
        artifacts_dir=artifacts_dir,
        progress=False,
    )


@pytest.fixture(scope="module")
def pipeline(artifacts_dir: Path) -> Iterator[DemoPipeline]:
    llm = LLMBuild("bf16", 1)
    with DemoPipeline(build("demo", llm, artifacts_dir), llm) as running:
        yield running


@pytest.mark.parametrize("llm", BUILDS, ids=lambda llm: llm.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_build_answers_every_sample(name: str, llm: LLMBuild, artifacts_dir: Path) -> None:
    with DemoPipeline(build(name, llm, artifacts_dir), llm) as running:
        given = {question.name: running.answer(question.request) for question in sample_questions()}
    assert given == {question.name: question.answer for question in sample_questions()}


# --- what breaks an answer ----------------------------------------------------------------------


def channels_swapped(tiles: Tiles, _: list[int]) -> Tiles:
    return tiles[..., ::-1]


def tiles_reversed(tiles: Tiles, per_image: list[int]) -> Tiles:
    """The tiles of one picture in the wrong order, its thumbnail where it belongs."""
    assert len(per_image) == 1
    return np.concatenate([tiles[-2::-1], tiles[-1:]])


def thumbnail_lost(tiles: Tiles, per_image: list[int]) -> Tiles:
    """The last tile once more in the place of the thumbnail."""
    assert len(per_image) == 1
    return np.concatenate([tiles[:-1], tiles[-2:-1]])


def images_swapped(tiles: Tiles, per_image: list[int]) -> Tiles:
    assert per_image == [1, 1]
    return tiles[::-1]


def frames_reversed(tiles: Tiles, per_image: list[int]) -> Tiles:
    assert per_image == [1] * len(tiles)
    return tiles[::-1]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("describe", channels_swapped, id="channel order"),
        pytest.param("small print, left", tiles_reversed, id="tile order, left"),
        pytest.param("small print, right", tiles_reversed, id="tile order, right"),
        pytest.param("top in tiles", thumbnail_lost, id="thumbnail"),
        pytest.param("second image", images_swapped, id="image order"),
        pytest.param("which image", images_swapped, id="image order, the other question"),
        pytest.param("motion", frames_reversed, id="frame order"),
    ],
)
def test_a_broken_step_breaks_the_answer(pipeline: DemoPipeline, name: str, fault: Fault) -> None:
    question = QUESTIONS[name]
    assert pipeline.answer(question.request) == question.answer
    assert pipeline.answer(question.request, fault) != question.answer


# --- the independent reference ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_the_right_answers(name: str, tmp_path: Path) -> None:
    """transformers' port, with the reference's tiles, frames and prompts, in fp32."""
    pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    from tests.oracle import Oracle

    checkpoint = demo_checkpoint(name, tmp_path / name)
    oracle = Oracle(checkpoint)
    end_id = reference_ids(checkpoint, "<|im_end|>")[-1]
    token_bytes = load_tokenizer(checkpoint).token_bytes
    for question in sample_questions():
        ids, tiles = reference_input(checkpoint, question)
        answer, margin = oracle.greedy_with_margin(ids, tiles, 64, end_id)
        assert token_bytes.join(answer).decode() == question.answer, question.name
        assert margin > 0.02, question.name  # no near tie that rounding could turn


def reference_input(checkpoint: Path, question: SampleQuestion) -> tuple[list[int], Tiles]:
    """Prompt ids and tiles as the model card makes them."""
    if question.request.videos:
        num_frames = question.request.sampling_parameters["num_frames"]
        frames = reference_frames(SAMPLES / question.files[0], num_frames)
        parts = [reference_tiles(frame, max_num=1) for frame in frames]
        prefix = "".join(f"Frame{number}: <image>\n" for number in range(1, len(parts) + 1))
    else:
        parts = [
            reference_tiles(Image.open(io.BytesIO(image))) for image in question.request.images
        ]
        names = [f"Image-{number}: " for number in range(1, len(parts) + 1)]
        prefix = "".join(f"{name if len(parts) > 1 else ''}<image>\n" for name in names)
    turns = [
        message["content"] if message["role"] == "assistant" else message["content"][-1]["text"]
        for message in json.loads(question.request.messages)
    ]
    turns[0] = prefix + turns[0]
    history = list(zip(turns[:-1:2], turns[1::2], strict=True))
    prompt = reference_prompt(history, turns[-1], [len(part) for part in parts])
    none = np.empty((0, 448, 448, 3), np.uint8)
    return reference_ids(checkpoint, prompt), np.concatenate([none, *parts])
