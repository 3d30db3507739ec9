"""The whole service on GPUs: the demo model answers its sample questions rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build import build_engines, make_server
from build.demo_checkpoint import DEMO, DEMO_INTERNLM2
from build.machine import Machine
from demo import SampleQuestion, sample_questions
from internvl_triton.client import Client
from internvl_triton.triton_server import find_free_port

pytestmark = pytest.mark.gpu

READY_TIMEOUT_S = 300.0


@pytest.fixture(
    scope="module",
    params=[(DEMO, 1), (DEMO, 2), (DEMO_INTERNLM2, 1)],
    ids=lambda param: f"{param[0]}-tp{param[1]}",
)
def client(request, tmp_path_factory, machine: Machine) -> Iterator[Client]:
    """A client of a demo model's service, its language model on one GPU or on two."""
    model, tp_size = request.param
    if len(machine.gpus) < tp_size:
        pytest.skip(f"TP={tp_size} needs {tp_size} GPUs; there is {len(machine.gpus)}")
    artifacts_dir: Path = tmp_path_factory.mktemp(f"gpu_{model}_tp{tp_size}")
    build_engines(model, profile="gpu", tp_size=tp_size, artifacts_dir=artifacts_dir)
    server = make_server(
        model,
        profile="gpu",
        tp_size=tp_size,
        artifacts_dir=artifacts_dir,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
    )
    with server:
        server.wait_ready(READY_TIMEOUT_S)
        with Client(server.grpc_url, timeout_s=120) as connected:
            yield connected


def arguments(question: SampleQuestion) -> dict[str, Any]:
    request = question.request
    return {
        "images": request.images,
        "videos": request.videos,
        "max_tokens": 64,
        **request.sampling_parameters,
    }


def test_the_sample_questions_are_answered(client: Client) -> None:
    questions = sample_questions()
    assert len(questions) >= 6
    expected = {question.name: question.answer for question in questions}
    for _ in range(2):  # the second time from the feature cache and the KV cache
        answers = {
            question.name: client.generate(
                json.loads(question.request.messages), **arguments(question)
            ).text
            for question in questions
        }
        assert answers == expected


def test_streaming_gives_the_same_answer_in_pieces(client: Client) -> None:
    question = sample_questions()[0]
    chunks = list(client.stream(json.loads(question.request.messages), **arguments(question)))
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks).strip() == question.answer


def test_a_question_without_a_picture_is_answered(client: Client) -> None:
    answer = client.generate("Hello", max_tokens=4)
    assert 1 <= answer.num_output_tokens <= 4
    again = client.generate("Hello", max_tokens=4)
    assert again.token_ids == answer.token_ids
