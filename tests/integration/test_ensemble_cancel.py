"""A caller that goes away frees its place in the batch, however it goes."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest

from internvl_triton import grpc_transport
from internvl_triton import tensor_contract as contract
from internvl_triton.client import AsyncClient
from internvl_triton.errors import RequestTimedOut
from internvl_triton.limits import Limits
from tests.integration.conftest import READY_TIMEOUT_S, Service, new_server
from tests.integration.processes import eventually, processes_naming, shared_memory_of

pytestmark = pytest.mark.triton

BATCH = Limits(max_seq_len=1).max_batch_size
# Minutes of work, and no early end. If a whole batch of these can start within PATIENCE_S after
# another one was running, every place of that other one has become free.
ENDLESS = {"max_tokens": 20_000, "min_tokens": 20_000}
PATIENCE_S = 30.0


@contextmanager
def closed_iterators(service: Service) -> Iterator[None]:
    with ExitStack() as streams:
        for number in range(BATCH):
            stream = service.client.stream(f"Question {number}?", timeout_s=PATIENCE_S, **ENDLESS)
            streams.enter_context(closing(stream))
            next(stream), next(stream)
        yield


@contextmanager
def cancelled_tasks(service: Service) -> Iterator[None]:
    async def answer(client: AsyncClient, number: int, generating: asyncio.Event) -> None:
        async for _ in client.stream(f"Question {number}?", **ENDLESS):
            generating.set()

    loop = asyncio.new_event_loop()

    async def start() -> tuple[AsyncClient, list[asyncio.Task[None]]]:
        client = AsyncClient(service.server.grpc_url, timeout_s=2 * PATIENCE_S)
        signals = [asyncio.Event() for _ in range(BATCH)]
        tasks = [loop.create_task(answer(client, n, signals[n])) for n in range(BATCH)]
        everything = asyncio.gather(*(signal.wait() for signal in signals))
        await asyncio.wait_for(everything, PATIENCE_S)
        return client, tasks

    async def finish(client: AsyncClient, tasks: list[asyncio.Task[None]]) -> list[Any]:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        return outcomes

    client, tasks = loop.run_until_complete(start())
    try:
        yield
    finally:
        outcomes = loop.run_until_complete(finish(client, tasks))
        loop.close()
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


@contextmanager
def foreign_streams(service: Service) -> Iterator[None]:
    """Plain tritonclient: it cancels its stream and knows nothing of our stop request."""
    from tritonclient.grpc import InferenceServerClient, InferInput

    def string(name: str, text: str) -> InferInput:
        tensor = InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode()], np.object_))
        return tensor

    stream_flag = InferInput("stream", [1], "BOOL")
    stream_flag.set_data_from_numpy(np.array([True]))
    clients = []
    try:
        for number in range(BATCH):
            client = InferenceServerClient(service.server.grpc_url)
            clients.append(client)
            responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
            client.start_stream(lambda result, error, into=responses: into.put((result, error)))
            inputs = [
                string("text_input", f"Question {number}?"),
                string("sampling_parameters", json.dumps(ENDLESS)),
                stream_flag,
            ]
            client.async_stream_infer(
                contract.ENSEMBLE.name, inputs, request_id=f"foreign {number}"
            )
            for _ in range(2):
                _, error = responses.get(timeout=PATIENCE_S)
                assert error is None, error
        yield
    finally:
        for client in clients:
            client.stop_stream(cancel_requests=True)
            client.close()


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our client's stop request alone has to do it: no stream is cancelled later."""
    monkeypatch.setattr(grpc_transport, "LINGER_S", 2 * PATIENCE_S)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("full_batch", [closed_iterators, cancelled_tasks, foreign_streams])
def test_a_caller_that_goes_away_frees_its_place(
    qwen2: Service, full_batch: Callable[[Service], Any]
) -> None:
    with full_batch(qwen2), pytest.raises(RequestTimedOut, match=r"no complete answer within 1 s"):
        qwen2.client.generate("Hi", max_tokens=1, timeout_s=1)  # no place is free
    assert all_places_are_free(qwen2)


@pytest.mark.usefixtures("no_fallback")
def test_a_deadline_frees_the_place(qwen2: Service) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(qwen2.server.grpc_url, timeout_s=2) as client:
            requests = (client.generate(f"Question {n}?", **ENDLESS) for n in range(BATCH))
            return await asyncio.gather(*requests, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert all(isinstance(outcome, RequestTimedOut) for outcome in outcomes), outcomes
    assert all_places_are_free(qwen2)


def all_places_are_free(service: Service) -> bool:
    """True, or the error of a request that found no place."""
    with closed_iterators(service):
        return True


def test_after_cancels_at_random_moments_the_server_ends_well(qwen2: Service) -> None:
    moments = random.Random(20)
    server = new_server(qwen2.checkpoint, qwen2.artifacts_dir)

    async def run() -> None:
        async with AsyncClient(server.grpc_url) as client:

            async def answer(max_tokens: int) -> None:
                async for _ in client.stream("Hi", max_tokens=max_tokens, min_tokens=max_tokens):
                    pass

            loop = asyncio.get_running_loop()
            started = loop.time()
            await answer(20)
            duration = loop.time() - started
            for _ in range(20):
                task = asyncio.create_task(answer(20))
                await asyncio.sleep(moments.uniform(0, duration))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            last = await client.generate("Hi", max_tokens=3)
            assert last.num_output_tokens == 3

    with server:
        server.wait_ready(READY_TIMEOUT_S)
        asyncio.run(run())
        regions = shared_memory_of(os.getpid())
    assert server.exit_code == 0, "a request was left behind: see the end of the server's log"
    options = f"--grpc-port={server.grpc_port}"
    assert eventually(lambda: processes_naming(options) == [])
    assert len(shared_memory_of(os.getpid())) < len(regions)
    assert not any(server._shared_memory_prefix in name for name in shared_memory_of(os.getpid()))
