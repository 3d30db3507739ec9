"""Many requests at once: nobody's answer depends on who else is being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from internvl_triton.client import Answer, AsyncClient
from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture
from tests.reference import reference_ids, reference_prompt, reference_tiles

if TYPE_CHECKING:
    from tests.oracle import Oracle

pytestmark = pytest.mark.triton

PICTURES = [encoded(picture(300 + seed, 300, seed)) for seed in range(3)]  # one tile each
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 7}


def mixed_requests() -> list[dict[str, Any]]:
    """Sixteen, twice as many as the batch holds: they wait, join and leave one by one."""
    requests: list[dict[str, Any]] = []
    for number in range(16):
        images = [[], [], PICTURES[:1], PICTURES[1:]][number % 4]
        max_tokens = 8 + 5 * (number % 5)
        sampling = SAMPLED if number % 8 in (1, 6) else {}
        requests.append(
            {
                "prompt": f"Question {number}?",
                "images": images,
                "max_tokens": max_tokens,
                "min_tokens": max_tokens,
                "stream": number % 3 > 0,
                **sampling,
            }
        )
    return requests


async def ask(client: AsyncClient, *, prompt: str, stream: bool, **arguments: Any) -> Answer:
    if not stream:
        return await client.generate(prompt, **arguments)
    answer = Answer()
    pieces = [chunk async for chunk in client.stream(prompt, answer=answer, **arguments)]
    assert [token for chunk in pieces for token in chunk.token_ids] == answer.token_ids
    assert all(len(chunk.token_ids) <= 1 for chunk in pieces)
    assert "".join(chunk.text for chunk in pieces) == answer.text
    return answer


def what_counts(answer: Answer) -> tuple[Any, ...]:
    return (answer.token_ids, answer.text, answer.num_input_tokens, answer.finish_reason)


def test_answers_in_company_are_those_given_alone(qwen2: Service) -> None:
    requests = mixed_requests()

    async def run() -> tuple[list[Answer], list[Answer]]:
        async with AsyncClient(qwen2.server.grpc_url, timeout_s=120) as client:
            alone = [await ask(client, **request) for request in requests]
            together = await asyncio.gather(*(ask(client, **request) for request in requests))
            return alone, together

    alone, together = asyncio.run(run())
    for request, one, other in zip(requests, alone, together, strict=True):
        assert what_counts(one) == what_counts(other), request
    lengths = [answer.num_output_tokens for answer in alone]
    assert lengths == [request["max_tokens"] for request in requests]
    assert len({tuple(answer.token_ids) for answer in alone}) > 12  # equal ones prove little


def test_a_seed_repeats_an_answer_and_another_one_does_not(qwen2: Service) -> None:
    answers = [
        qwen2.client.generate("Name two colors.", max_tokens=16, **{**SAMPLED, "seed": seed})
        for seed in (7, 7, 8)
    ]
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


@pytest.mark.parametrize("stream", [True, False])
def test_log_probs_are_the_oracles(
    service: Service, load_oracle: Callable[[Path], Oracle], stream: bool
) -> None:
    question, image = "What is a triangle?", picture(300, 300)
    tiles = reference_tiles(image)
    ids = reference_ids(
        service.checkpoint, reference_prompt([], f"<image>\n{question}", [len(tiles)])
    )
    asked = {"images": [encoded(image)], "max_tokens": 8, "logprobs": True}
    answer = Answer()
    if stream:
        for chunk in service.client.stream(question, answer=answer, **asked):
            assert len(chunk.log_probs) == len(chunk.token_ids)
    else:
        answer = service.client.generate(question, **asked)
    assert len(answer.log_probs) == len(answer.token_ids) == 8

    logits = load_oracle(service.checkpoint).logits([*ids, *answer.token_ids], tiles)
    rows = logits[len(ids) - 1 : -1].astype(np.float64)
    normaliser = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    expected = rows[np.arange(8), answer.token_ids] - normaliser
    np.testing.assert_allclose(answer.log_probs, expected, atol=1e-3, rtol=0)


def test_the_second_question_about_a_picture_runs_no_vision_engine(qwen2: Service) -> None:
    jpeg = encoded(picture(1600, 1200, seed=99), "JPEG")
    other = encoded(picture(1600, 1200, seed=98), "JPEG")
    busy, answers = [], []
    for image in (jpeg, jpeg, other):
        before = vision_ns(qwen2)
        answers.append(qwen2.client.generate("What is it?", images=[image], max_tokens=8))
        busy.append(vision_ns(qwen2) - before)
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids
    # Thirteen tiles take far longer to encode than to look up.
    assert busy[1] < min(busy[0], busy[2]) / 3


def vision_ns(service: Service) -> int:
    """Nanoseconds that vision_encoder has spent on requests since the start."""
    return int(service.statistics("vision_encoder").inference_stats.compute_infer.ns)
