"""The whole service on GPUs: the demo's picture and question, answered as the reference does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from build import build_engines, make_server
from build.machine import Machine
from internvl_triton.client import Client
from internvl_triton.model_spec import ModelSpec
from internvl_triton.triton_server import find_free_port

pytestmark = pytest.mark.gpu

SAMPLES = Path(__file__).parents[2] / "clients" / "samples"
READY_TIMEOUT_S = 300.0


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def client(request, tmp_path_factory, machine: Machine) -> Iterator[Client]:
    """A client of the demo's service, its language model on one GPU or on two."""
    tp_size: int = request.param
    if len(machine.gpus) < tp_size:
        pytest.skip(f"TP={tp_size} needs {tp_size} GPUs; there is {len(machine.gpus)}")
    artifacts_dir: Path = tmp_path_factory.mktemp(f"gpu_tp{tp_size}")
    artifacts = build_engines("demo", profile="gpu", tp_size=tp_size, artifacts_dir=artifacts_dir)
    spec: ModelSpec = artifacts.spec()
    assert tp_size in spec.llm.valid_tp_sizes
    server = make_server(
        "demo",
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


def test_the_demo_is_answered_as_by_the_reference(client: Client) -> None:
    expected = json.loads((SAMPLES / "shapes.json").read_text())
    picture = (SAMPLES / expected["image"]).read_bytes()
    for _ in range(2):  # the second time from the feature cache and the KV cache
        answer = client.generate(
            expected["prompt"], images=[picture], max_tokens=expected["max_tokens"]
        )
        assert answer.token_ids == expected["token_ids"]
        assert answer.num_output_tokens == len(expected["token_ids"])


def test_streaming_gives_the_same_answer_in_pieces(client: Client) -> None:
    expected = json.loads((SAMPLES / "shapes.json").read_text())
    picture = (SAMPLES / expected["image"]).read_bytes()
    chunks = list(
        client.stream(expected["prompt"], images=[picture], max_tokens=expected["max_tokens"])
    )
    assert len(chunks) > 1
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert ids == expected["token_ids"]


def test_a_question_without_a_picture_is_answered(client: Client) -> None:
    answer = client.generate("Hello", max_tokens=4)
    assert 1 <= answer.num_output_tokens <= 4
    again = client.generate("Hello", max_tokens=4)
    assert again.token_ids == answer.token_ids
