"""The schedule of requests: who asks when, and what counts."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np
import pytest

from benchmarks.load import Load, arrival_times, run_load
from benchmarks.records import RequestRecord
from benchmarks.targets import open_target
from benchmarks.turn import Turn
from benchmarks.workload import Conversation
from internvl_triton.errors import InvalidRequest


def arrivals(count: int, **fields: object) -> list[float]:
    load = Load(conversations=count, **fields)  # type: ignore[arg-type]
    return list(itertools.islice(arrival_times(load), count))


def test_constant_arrivals() -> None:
    assert arrivals(4, rate=5.0, arrivals="constant") == pytest.approx([0, 0.2, 0.4, 0.6])


def test_a_ramp_grows_the_rate_evenly() -> None:
    times = arrivals(101, rate=10.0, arrivals="constant", ramp_s=10.0)
    assert times[50] == pytest.approx(10.0)  # 10 * 10 / 2 arrivals during the ramp
    assert times[100] - times[90] == pytest.approx(1.0)  # then 10 a second
    assert sum(time < 5 for time in times) == 13  # R t^2 / 2 ramp = 12.5, and the one at 0


def test_poisson_arrivals() -> None:
    times = arrivals(20_000, rate=50.0, seed=7)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # of an exponential: its mean
    assert times == arrivals(20_000, rate=50.0, seed=7)
    assert times != arrivals(20_000, rate=50.0, seed=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": 1},
        {"conversations": 1, "rate": 1.0, "concurrency": 1},
        {"concurrency": 1},
        {"concurrency": 0, "conversations": 1},
        {"rate": float("inf"), "conversations": 1},
        {"rate": 1.0, "duration_s": -1.0},
        {"rate": 1.0, "conversations": 1, "ramp_s": -5.0},
        {"concurrency": 1, "conversations": 1, "ramp_s": float("nan")},
        {"concurrency": 1, "conversations": 1, "warm_up": -1},
    ],
)
def test_loads_that_cannot_be_run(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Load(**fields)  # type: ignore[arg-type]


class Counting:
    """Answers with the number of messages; fails the conversations that it is told to."""

    def __init__(self, failing: frozenset[int] = frozenset()) -> None:
        self.failing = failing
        self.turns: list[Turn] = []
        self.running = self.most = 0

    async def model(self) -> str:
        return "counting"

    async def aclose(self) -> None: ...

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        self.turns.append(turn)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        record.error = "failed" if record.number in self.failing else ""
        return f"answer {len(turn.messages)}"


class Slow(Counting):
    """Answers after 20 ms."""

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        record.sent_s = time.perf_counter()
        await asyncio.sleep(0.02)
        record.ended_s = time.perf_counter()
        return await super().ask(turn, record)


class OneTurn:
    def conversation(self, number: int) -> Conversation:
        return Conversation(("one",), (3,), (), (), 0, 0)


def test_users_of_a_ramp_start_one_after_the_other_and_do_not_count_before_its_end() -> None:
    load = Load(concurrency=4, duration_s=0.9, ramp_s=0.6)
    records = asyncio.run(run_load(Slow(), OneTurn(), load))
    began = records[0].sent_s
    at_once = [sum(r.sent_s <= began + t < r.ended_s for r in records) for t in (0.07, 0.23, 0.53)]
    assert at_once[0] == 1
    assert max(at_once) <= 4
    assert sum(r.sent_s - began < 0.14 for r in records) <= 8  # one user's, of 20 ms each
    for record in records:
        after_s = record.sent_s - began
        if abs(after_s - 0.6) > 0.05:
            assert record.warm_up == (after_s < 0.6)
    assert any(not record.warm_up for record in records)


@pytest.mark.parametrize("load", [{"concurrency": 2}, {"rate": 50.0, "arrivals": "constant"}])
def test_a_duration_ends_the_run(load: dict[str, Any]) -> None:
    records = asyncio.run(run_load(Slow(), OneTurn(), Load(duration_s=0.3, **load)))
    sent = [record.sent_s - records[0].sent_s for record in records]
    assert 0.2 < max(sent) < 0.6
    assert all(record.ended_s for record in records), "what was sent is waited for"


def test_only_first_turns_of_an_open_loop_have_a_planned_time() -> None:
    records = asyncio.run(run_load(Slow(), Fixed(), Load(rate=100, conversations=3)))
    planned: dict[int, list[bool]] = {}
    for record in records:
        planned.setdefault(record.number, []).append(record.due_s is not None)
    assert planned == {number: [True, False] for number in range(3)}


class Fixed:
    def conversation(self, number: int) -> Conversation:
        return Conversation(("one", "two"), (3, 4), (b"jpeg",), (), 1, 1)


def test_closed_loop_keeps_its_users_busy() -> None:
    target = Counting(frozenset({1}))
    load = Load(concurrency=4, conversations=10, warm_up=2)
    records = asyncio.run(run_load(target, Fixed(), load))
    assert target.most == 4
    assert sorted({record.number for record in records}) == list(range(12))
    assert len(records) == 2 * 12 - 1  # the failed conversation has no second turn
    assert {record.number for record in records if record.warm_up} == {0, 1}


def test_a_second_turn_repeats_the_first_one_and_its_answer() -> None:
    target = Counting()
    asyncio.run(run_load(target, Fixed(), Load(concurrency=1, conversations=1)))
    first, second = target.turns
    image, text = {"type": "image"}, {"type": "text", "text": "one"}
    assert first.messages == [{"role": "user", "content": [image, text]}]
    assert (first.max_tokens, second.max_tokens) == (3, 4)
    assert second.messages == [
        *first.messages,
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    assert first.images == second.images == (b"jpeg",)


def test_addresses() -> None:
    with pytest.raises(InvalidRequest, match="is no target"):
        open_target("localhost:8001", timeout_s=1)
    with pytest.raises(InvalidRequest, match="for OpenAI endpoints only"):
        open_target("grpc://localhost:8001", timeout_s=1, extra={"ignore_eos": True})


def test_how_late_the_generator_itself_was_is_noted() -> None:
    class Busy(Slow):
        """Holds the event loop up for 0.1 s."""

        async def ask(self, turn: Turn, record: RequestRecord) -> str:
            time.sleep(0.1)
            return await super().ask(turn, record)

    lags_s: list[float] = []
    load = Load(concurrency=1, conversations=3)
    asyncio.run(run_load(Busy(), OneTurn(), load, lags_s=lags_s))
    assert sum(lag > 0.08 for lag in lags_s) >= 2
    lags_s.clear()
    asyncio.run(run_load(Slow(), OneTurn(), load, lags_s=lags_s))
    assert lags_s
    assert np.median(lags_s) < 0.08
