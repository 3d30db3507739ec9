"""How fast a place in the batch is free again, read from the engine's own gauges."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from benchmarks.prometheus import Samples, read_samples
from internvl_triton.client import Answer, AsyncClient
from internvl_triton.errors import RequestTimedOut
from internvl_triton.limits import Limits
from tests.integration.conftest import Service
from tests.integration.test_ensemble_cancel import (
    ENDLESS,
    cancelled_tasks,
    closed_iterators,
    foreign_streams,
)

pytestmark = pytest.mark.triton

BATCH = Limits(max_seq_len=1).max_batch_size
PATIENCE_S = 60.0
# Without the cancel the answers go on for minutes. `benchmarks` measures how fast it is.
FREE_WITHIN_S = 30.0

PROGRAM = """
import sys
from internvl_triton.client import Client
stream = Client(sys.argv[1]).stream("Question?", max_tokens=20000, min_tokens=20000)
next(stream)
print("generating", flush=True)
for _ in stream:
    pass
"""


def metrics(service: Service) -> Samples:
    return read_samples(service.server.metrics_url)


def in_flight(service: Service) -> tuple[int, int]:
    """Requests that run and that wait."""
    now = metrics(service)
    return int(now.sum("internvl_requests_running")), int(now.sum("internvl_requests_waiting"))


def seconds_until(service: Service, expected: tuple[int, int]) -> float:
    """Until the gauges show that many running and waiting requests."""
    started = time.perf_counter()
    while (seen := in_flight(service)) != expected:
        assert time.perf_counter() - started < PATIENCE_S, f"still {seen} running and waiting"
        time.sleep(0.01)
    return time.perf_counter() - started


@contextmanager
def killed_processes(service: Service) -> Iterator[None]:
    """Clients that end without a word."""
    with ExitStack() as running:
        started = []
        for _ in range(BATCH):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, service.server.grpc_url],
                stdout=subprocess.PIPE,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            started.append(running.enter_context(process))
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "generating\n"
        yield
        for process in started:
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    "full_batch", [closed_iterators, cancelled_tasks, foreign_streams, killed_processes]
)
def test_every_way_of_leaving_frees_the_place(
    qwen2: Service,
    full_batch: Callable[[Service], AbstractContextManager[None]],
    record_property: Callable[[str, object], None],
) -> None:
    seconds_until(qwen2, (0, 0))
    stopped = metrics(qwen2).sum("internvl_requests_stopped_total")
    with full_batch(qwen2):
        seconds_until(qwen2, (BATCH, 0))
        left = time.perf_counter()
    seconds_until(qwen2, (0, 0))
    free_s = time.perf_counter() - left  # of all places, one caller after the other
    record_property("free_s", round(free_s, 3))
    print(f"{full_batch.__name__}: {BATCH} places free after {free_s:.3f} s")  # noqa: T201
    assert free_s < FREE_WITHIN_S
    assert metrics(qwen2).sum("internvl_requests_stopped_total") == stopped + BATCH


def test_a_deadline_frees_the_place(
    qwen2: Service, record_property: Callable[[str, object], None]
) -> None:
    deadline_s = 3.0

    async def run() -> float:
        async with AsyncClient(qwen2.server.grpc_url, timeout_s=deadline_s) as client:
            requests = [
                asyncio.create_task(client.generate(f"Question {n}?", **ENDLESS))
                for n in range(BATCH)
            ]
            for outcome in await asyncio.gather(*requests, return_exceptions=True):
                assert isinstance(outcome, RequestTimedOut), outcome
            return await asyncio.to_thread(seconds_until, qwen2, (0, 0))

    seconds_until(qwen2, (0, 0))
    free_s = asyncio.run(run())
    record_property("free_s", round(free_s, 3))
    print(f"deadline: {BATCH} places free after {free_s:.3f} s")  # noqa: T201
    assert free_s < FREE_WITHIN_S


async def ask_full_batch(client: AsyncClient) -> None:
    """As many requests as the batch holds, 30 tokens each."""
    answers = await asyncio.gather(
        *(client.generate(f"Question {n}?", max_tokens=30, min_tokens=30) for n in range(BATCH))
    )
    assert all(answer.num_output_tokens == 30 for answer in answers)


def test_50_cancels_at_random_moments_leave_no_work_behind(qwen2: Service) -> None:
    moments = random.Random(50)

    async def leave(client: AsyncClient, number: int, lifetime_s: float) -> None:
        """One of three ways, at a moment anywhere between sending and the middle of an answer."""
        if number % 3 == 0:
            with pytest.raises(RequestTimedOut):
                await client.generate("Hello?", timeout_s=lifetime_s, **ENDLESS)
            return
        work = client.generate("Hi", **ENDLESS) if number % 3 == 1 else _drain(client)
        task = asyncio.create_task(work)
        await asyncio.sleep(lifetime_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def generated_tokens() -> int:
        return int(metrics(qwen2).sum("internvl_generated_tokens_total"))

    async def run() -> int:
        async with AsyncClient(qwen2.server.grpc_url, timeout_s=PATIENCE_S) as client:
            # more at once than the batch holds: some are cancelled in the queue
            await asyncio.gather(
                *(leave(client, number, moments.uniform(0, 2)) for number in range(50))
            )
            await asyncio.to_thread(seconds_until, qwen2, (0, 0))
            before = generated_tokens()
            await ask_full_batch(client)
            await asyncio.to_thread(seconds_until, qwen2, (0, 0))
            return generated_tokens() - before

    seconds_until(qwen2, (0, 0))
    assert asyncio.run(run()) == 30 * BATCH  # and none for those that have left
    with closed_iterators(qwen2):  # every place takes a request again
        seconds_until(qwen2, (BATCH, 0))
    seconds_until(qwen2, (0, 0))


async def _drain(client: AsyncClient) -> Answer:
    answer = Answer()
    async for _ in client.stream("Hello?", answer=answer, **ENDLESS):
        pass
    return answer
