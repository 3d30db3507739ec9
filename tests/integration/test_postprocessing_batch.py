"""A service whose last step takes many chunks at a time answers as one that takes each alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from build.engines import build_engines
from internvl_triton import grpc_transport
from internvl_triton.client import Answer, AsyncClient, Client
from internvl_triton.errors import InvalidRequest, RequestTimedOut
from tests.integration.conftest import READY_TIMEOUT_S, Service, new_server
from tests.integration.test_ensemble_cancel import (
    all_places_are_free,
    cancelled_tasks,
    closed_iterators,
)
from tests.integration.test_ensemble_http import parsed, post
from tests.integration.test_ensemble_load import ask, mixed_requests, what_counts

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def batching(
    start_service: Callable[[str], Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The same checkpoint as the service `qwen2`."""
    checkpoint = start_service("qwen2").checkpoint
    artifacts_dir = tmp_path_factory.mktemp("batching")
    build_engines(str(checkpoint), artifacts_dir=artifacts_dir, progress=False)
    with new_server(checkpoint, artifacts_dir, postprocessing_batch=64) as server:
        server.wait_ready(READY_TIMEOUT_S)
        with Client(server.grpc_url, timeout_s=120) as client:
            yield Service(checkpoint, artifacts_dir, 1, server, client)


def test_a_batch_of_none_is_refused(qwen2: Service) -> None:
    with pytest.raises(InvalidRequest, match=r"--postprocessing-batch is 0; it takes 1 or more"):
        new_server(qwen2.checkpoint, qwen2.artifacts_dir, postprocessing_batch=0)


async def ask_all(service: Service, requests: list[dict[str, Any]]) -> list[Answer]:
    async with AsyncClient(service.server.grpc_url, timeout_s=120) as client:
        return list(await asyncio.gather(*(ask(client, **request) for request in requests)))


def test_answers_are_the_same(batching: Service, qwen2: Service) -> None:
    requests = mixed_requests()
    for request in requests[::3]:
        request |= {"logprobs": True, "top_logprobs": 2}
    for request in requests[1::3]:
        request |= {"stop": ["a", "e"], "min_tokens": 1}
    found = asyncio.run(ask_all(batching, requests))
    for one, other in zip(found, asyncio.run(ask_all(qwen2, requests)), strict=True):
        assert what_counts(one) == what_counts(other)
        # Who else is in the engine's batch shows in the last digits.
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        for top, other_top in zip(one.top_log_probs, other.top_log_probs, strict=True):
            assert top == pytest.approx(other_top, abs=1e-4)
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert all(len(answer.top_log_probs) == answer.num_output_tokens for answer in found[::3])
    last = batching.statistics("postprocessing")
    assert last.execution_count < last.inference_count  # it ran less often than it had chunks


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
@pytest.mark.parametrize("sampling", [{}, {"stop": "e"}, {"top_logprobs": 3, "logprobs": True}])
def test_plain_http_has_every_output(
    batching: Service, qwen2: Service, verb: str, sampling: dict[str, Any]
) -> None:
    body: dict[str, Any] = {
        "text_input": "What is a triangle?",
        "sampling_parameters": json.dumps({"max_tokens": 12, **sampling}),
        "stream": verb == "generate_stream",
    }

    def answered(service: Service) -> list[dict[str, Any]]:
        events = post(service, verb, {**body, "id": f"{verb} {sampling}"}).split(b"\n\n")
        return [parsed(event.removeprefix(b"data: ")) for event in events if event]

    for one, other in zip(answered(batching), answered(qwen2), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Who else was in the engine's batch shows in the last digits.
            exact = "log_probs" not in name
            assert value == (other[name] if exact else pytest.approx(other[name], abs=1e-4)), name


def test_bad_input_is_an_error_of_its_request_only(batching: Service) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(batching.server.grpc_url, timeout_s=60) as client:
            good = [ask(client, prompt=f"Q{n}", stream=True, max_tokens=16) for n in range(6)]
            bad = [client.generate("Q", images=[b"no picture"]) for _ in range(3)]
            return await asyncio.gather(*good, *bad, return_exceptions=True)

    *good, first, second, third = asyncio.run(run())
    assert all(answer.token_ids for answer in good)
    assert all(isinstance(error, InvalidRequest) for error in (first, second, third))


@pytest.mark.parametrize("full_batch", [closed_iterators, cancelled_tasks])
def test_our_clients_free_their_places(
    batching: Service, full_batch: Callable[[Service], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They send a stop; no stream is cancelled later."""
    monkeypatch.setattr(grpc_transport, "LINGER_S", 60.0)
    with full_batch(batching), pytest.raises(RequestTimedOut):
        batching.client.generate("Hi", max_tokens=1, timeout_s=1)  # no place is free
    assert all_places_are_free(batching)
