"""The demo model behind the running service: its samples, and scenes it has never seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from benchmarks.accuracy import ask_all
from benchmarks.vqa import scene_questions
from build.demo_checkpoint import DEMO_NAMES
from demo import SampleQuestion, sample_questions
from internvl_triton.client import AsyncClient
from tests.integration.conftest import Service
from tests.integration.samples import assert_right

pytestmark = pytest.mark.triton

SCENES = 30
# Of 1,080 questions it answers 94 % (`make accuracy MODEL=demo EXAMPLES=150`); these are few.
LEAST_EXACT = 0.95


@pytest.fixture(params=DEMO_NAMES)
def demo(request: pytest.FixtureRequest, start_service: Callable[[str], Service]) -> Service:
    return start_service(request.param)


@pytest.mark.parametrize("question", sample_questions(), ids=lambda question: question.name)
def test_samples(demo: Service, question: SampleQuestion) -> None:
    assert_right(demo.client, question)


def test_fresh_scenes(demo: Service) -> None:
    questions = list(scene_questions(SCENES, seed=7))

    async def ask() -> list[bool]:
        async with AsyncClient(demo.server.grpc_url) as client:
            results = await ask_all(client, questions, concurrency=4, max_tokens=64)
        return [result.exact for result in results]

    right = asyncio.run(ask())
    assert len(right) > 4 * SCENES
    assert sum(right) / len(right) >= LEAST_EXACT
