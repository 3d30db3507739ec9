"""The schedule of requests, and what an event stream is read as."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest

from benchmarks.load import Load, arrival_times, run_load
from benchmarks.records import RequestRecord
from benchmarks.targets import Turn, _read_events, open_target
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

    async def close(self) -> None: ...

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        self.turns.append(turn)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        record.error = "failed" if record.number in self.failing else ""
        return f"answer {len(turn.messages)}"


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


def read(*pieces: bytes) -> tuple[RequestRecord, str]:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    record, text = RequestRecord(0), list[str]()
    asyncio.run(_read_events(stream(), record, text))
    return record, "".join(text)


def event(**fields: object) -> bytes:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


def delta(**fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def test_events_are_read_however_the_network_cuts_them() -> None:
    whole = b"".join(
        [
            delta(role="assistant", content=""),
            b": comment\n\n",
            delta(content="Ä"),
            delta(content="b"),
            USAGE,
            DONE,
        ]
    )
    for size in (1, 3, 50, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        record, text = read(*pieces)
        assert text == "Äb"
        assert len(record.chunks_s) == 2  # a role only is no text
        assert (record.input_tokens, record.output_tokens, record.error) == (7, 3, "")


def test_what_goes_wrong_in_a_stream_has_a_kind() -> None:
    assert read(delta(content="a"), USAGE)[0].error == "cut off"
    assert read(delta(content="a"), DONE)[0].error == "no usage"
    failed, _ = read(delta(content="a"), event(error={"message": "out of memory"}))
    assert failed.error == "error event"
    assert "out of memory" in failed.message


def test_addresses() -> None:
    with pytest.raises(InvalidRequest, match="is no target"):
        open_target("localhost:8001", timeout_s=1)
    with pytest.raises(InvalidRequest, match="for OpenAI endpoints only"):
        open_target("grpc://localhost:8001", timeout_s=1, extra={"ignore_eos": True})
