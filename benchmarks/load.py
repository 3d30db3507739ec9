"""The load generator: conversations of a workload, sent by a schedule, noted in records.

closed loop: a number of users; each asks its next question when the last one is answered.
open loop:   conversations arrive at a rate whatever the server does, evenly or at random (Poisson).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.records import RequestRecord
from benchmarks.targets import Target, open_target
from benchmarks.turn import Message, Turn
from benchmarks.workload import Conversation, Workload
from internvl_triton.errors import InvalidRequest

__all__ = ["Load", "arrival_times", "run_load", "run_load_at"]

LAG_PERIOD_S = 0.005
_DRAWN_AHEAD = 64


@dataclass(frozen=True)
class Load:
    """How hard and how long.

    concurrency: users of a closed loop; or rate: conversations per second of an open loop.
    ramp_s: users start one after the other, or the rate grows evenly from 0, for so long. What is
        sent meanwhile is not measured: it met another load.
    warm_up: the first conversations, which are asked but not measured.
    conversations, duration_s: the end, whichever comes first; what was sent is waited for. The
        duration begins with the ramp.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrivals: Literal["poisson", "constant"] = "poisson"
    ramp_s: float = 0.0
    warm_up: int = 0
    conversations: int | None = None
    duration_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what cannot be run."""
        if (self.concurrency is None) == (self.rate is None):
            raise InvalidRequest("give either a concurrency (closed loop) or a rate (open loop)")
        if self.conversations is None and self.duration_s is None:
            raise InvalidRequest("give a number of conversations or a duration")
        numbers = {
            "concurrency": self.concurrency,
            "rate": self.rate,
            "conversations": self.conversations,
            "duration_s": self.duration_s,
        }
        for name, value in numbers.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value}; it must be above 0")
        for name, value in {"ramp_s": self.ramp_s, "warm_up": self.warm_up}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value}; it must be at least 0")

    @property
    def name(self) -> str:
        if self.rate is None:
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g}/s {self.arrivals}"


async def run_load(
    target: Target, workload: Workload, load: Load, *, lags_s: list[float] | None = None
) -> list[RequestRecord]:
    """Every request's record, in the order of sending; those that do not count are marked.

    lags_s: gets, every LAG_PERIOD_S, by how much the load generator was late: so late it may have
    noted what came meanwhile.
    """
    run = _Run(target, workload, load)
    watching = None if lags_s is None else asyncio.create_task(_note_lags(lags_s))
    try:
        await (run.closed_loop() if load.rate is None else run.open_loop())
    finally:
        if watching is not None:
            watching.cancel()
    return sorted(run.records, key=lambda record: record.sent_s)


async def _note_lags(lags_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        lags_s.append(time.perf_counter() - due_s)


def run_load_at(
    address: str,
    workload: Workload,
    load: Load,
    *,
    lags_s: list[float] | None = None,
    **options: Any,
) -> list[RequestRecord]:
    """`run_load` against the target at `address`. options: of `open_target`."""

    async def run() -> list[RequestRecord]:
        async with contextlib.aclosing(open_target(address, **options)) as target:
            return await run_load(target, workload, load, lags_s=lags_s)

    return asyncio.run(run())


def arrival_times(load: Load) -> Iterator[float]:
    """Seconds after the start at which conversations arrive, without end.

    Formula: the k-th arrival is at t with L(t) = u_k, where L is the integral of the rate
    (R t^2 / 2 ramp during the ramp, R (t - ramp / 2) after it), and u_k = k for constant arrivals
    or the sum of k exponential draws of mean 1 for a Poisson process.
    """
    assert load.rate is not None
    random = np.random.default_rng(load.seed)
    total = 0.0
    for k in itertools.count():
        total = float(k) if load.arrivals == "constant" else total + random.exponential()
        if total <= load.rate * load.ramp_s / 2:
            yield math.sqrt(2 * load.ramp_s * total / load.rate)
        else:
            yield total / load.rate + load.ramp_s / 2


class _Run:
    def __init__(self, target: Target, workload: Workload, load: Load) -> None:
        self.records: list[RequestRecord] = []
        self._target = target
        self._workload = workload
        self._load = load
        self._numbers = itertools.count()
        total = math.inf if load.conversations is None else load.conversations + load.warm_up
        ahead = range(int(min(_DRAWN_AHEAD, total)))
        self._ahead = {number: workload.conversation(number) for number in ahead}
        self._started = time.perf_counter()

    async def closed_loop(self) -> None:
        users = self._load.concurrency or 1

        async def user(place: int) -> None:
            await asyncio.sleep(self._load.ramp_s * place / users)
            while (number := self._next_number()) is not None:
                conversation = await self._drawn(number)
                await self._talk(number, conversation, due_s=None)

        await _gather([user(place) for place in range(users)])

    async def open_loop(self) -> None:
        talks: set[asyncio.Task[None]] = set()
        try:
            for arrival in arrival_times(self._load):
                due_s = self._started + arrival
                over = self._load.duration_s is not None and arrival > self._load.duration_s
                if over or (number := self._next_number()) is None:
                    break
                conversation = await self._drawn(number)  # ahead of its time
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                talk = asyncio.create_task(self._talk(number, conversation, due_s=due_s))
                talks.add(talk)
            await asyncio.gather(*talks)
        finally:
            for talk in talks:
                talk.cancel()

    async def _drawn(self, number: int) -> Conversation:
        """Beside the event loop, which notes the times of the other requests meanwhile."""
        if number in self._ahead:
            return self._ahead.pop(number)
        return await asyncio.to_thread(self._workload.conversation, number)

    def _next_number(self) -> int | None:
        """The next conversation's, or None when the run is over."""
        number, load = next(self._numbers), self._load
        if load.conversations is not None and number >= load.conversations + load.warm_up:
            return None
        late = load.duration_s is not None and self._elapsed_s() > load.duration_s
        return None if late else number

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    async def _talk(self, number: int, conversation: Conversation, due_s: float | None) -> None:
        """All turns of one conversation; the first one that fails ends it."""
        messages: list[Message] = []
        media: list[dict[str, Any]] = [{"type": "image"}] * len(conversation.images)
        media += [{"type": "video"}] * len(conversation.videos)
        turns = zip(conversation.prompts, conversation.max_tokens, strict=True)
        for place, (prompt, max_tokens) in enumerate(turns):
            text = {"type": "text", "text": prompt}
            messages.append({"role": "user", "content": [*([] if place else media), text]})
            record = RequestRecord(
                number=number,
                due_s=None if place else due_s,
                num_images=conversation.num_images,
                num_tiles=conversation.num_tiles,
                warm_up=number < self._load.warm_up or self._elapsed_s() < self._load.ramp_s,
            )
            self.records.append(record)
            turn = Turn(
                list(messages),
                max_tokens,
                conversation.images,
                conversation.videos,
                dict(conversation.sampling),
            )
            answer = await self._target.ask(turn, record)
            if record.error:
                return
            messages.append({"role": "assistant", "content": answer})


async def _gather(users: list[Any]) -> None:
    tasks = [asyncio.create_task(user) for user in users]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
