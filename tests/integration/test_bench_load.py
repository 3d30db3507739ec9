"""The load generator against a server whose TTFT and token gap are set: it must report them."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load
from benchmarks.metrics import (
    defined,
    distribution,
    errors_by_kind,
    gaps_s,
    latency_s,
    lateness_s,
    request_throughput,
    tpot_s,
    ttft_s,
    window_s,
)
from benchmarks.paced_server import paced_server
from benchmarks.records import RequestRecord
from benchmarks.targets import open_target
from benchmarks.workload import Case, GeneratedWorkload

TTFT_S, GAP_S, TOKENS = 0.8, 0.2, 6
WITHIN = 0.02


def run(address: str, load: Load, *mix: str, turns: int = 1) -> tuple[list[RequestRecord], float]:
    """Records, and how late this machine woke a sleeping program meanwhile (90th percentile).

    On a quiet machine that is less than a millisecond, and the promise of 2 % is what is tested;
    on a busy one a set time cannot be kept by anybody, so twice the lateness is allowed.
    """
    workload = GeneratedWorkload(
        tuple(map(Case.parse, mix)), turns=turns, output_tokens=Lengths(str(TOKENS))
    )
    late: list[float] = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.02)
            late.append(time.perf_counter() - began - 0.02)

    async def talk() -> list[RequestRecord]:
        target = open_target(address, timeout_s=120)
        watching = asyncio.create_task(watch())
        try:
            assert await target.model() == "paced"
            return await run_load(target, workload, load)
        finally:
            watching.cancel()
            await target.aclose()

    return asyncio.run(talk()), 2 * distribution(late).p90


def near(seconds: float, noise_s: float) -> object:
    return pytest.approx(seconds, abs=WITHIN * seconds + noise_s)


@pytest.fixture(scope="module", params=["grpc", "http"])
def address(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with paced_server(ttft_s=TTFT_S, gap_s=GAP_S) as addresses:
        yield addresses[0 if request.param == "grpc" else 1]


def test_reported_times_are_the_set_ones_within_2_percent(address: str) -> None:
    load = Load(concurrency=3, conversations=6, warm_up=3)
    records, noise_s = run(address, load, "64x64", "text")
    measured = [record for record in records if not record.warm_up]
    assert (len(records), len(measured)) == (9, 6)
    assert errors_by_kind(records) == {}
    answer_s = TTFT_S + (TOKENS - 1) * GAP_S
    # Medians: one late wake-up on a busy machine is the machine's, not the generator's. A request
    # begins with several wake-ups (channel, stream, server), so TTFT gets their sum.
    assert distribution(defined(ttft_s, measured)).p50 == near(TTFT_S, 4 * noise_s)
    assert distribution(gaps_s(measured)).p50 == near(GAP_S, noise_s)
    assert distribution(defined(tpot_s, measured)).p50 == near(GAP_S, noise_s)
    assert distribution(defined(latency_s, measured)).p50 == near(answer_s, 4 * noise_s)
    assert {(r.input_tokens, r.output_tokens) for r in measured} == {(10, TOKENS)}
    # Two rounds of three users, without a pause between an answer and the next question.
    assert window_s(measured) == near(2 * answer_s, 8 * noise_s)
    assert request_throughput(measured) == pytest.approx(6 / window_s(measured))


def test_open_loop_keeps_its_rate_whatever_the_server_does(address: str) -> None:
    load = Load(rate=5, arrivals="constant", conversations=12)
    records, noise_s = run(address, load, "text")
    sent = [record.sent_s - records[0].sent_s for record in records]
    late = [got - k / 5 for k, got in enumerate(sent)]
    assert distribution(late).p50 == pytest.approx(0, abs=0.02 + noise_s)
    # All 12 were sent, 2.2 s, while the first answer of 1.8 s and the next ones were going on.
    assert max(sent) < 2.2 + 1.8
    assert defined(lateness_s, records) == pytest.approx(late, abs=0.02 + noise_s)


def test_turns_follow_each_other(address: str) -> None:
    (first, second), _ = run(address, Load(concurrency=1, conversations=1), "64x64", turns=2)
    assert first.number == second.number == 0
    assert second.sent_s >= first.ended_s
