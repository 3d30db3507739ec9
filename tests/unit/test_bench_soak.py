"""The soak's arithmetic and what it notices, against scripted servers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from benchmarks import soak as module
from benchmarks.soak import Soak, mixed_requests, report, slope_per_minute, soak
from internvl_triton.client import AsyncClient
from internvl_triton.errors import RequestFailed
from internvl_triton.fake_transport import FakeTransport, fake_response


def test_the_slope_is_the_least_squares_line() -> None:
    assert slope_per_minute([(0, 5.0), (30, 6.0), (60, 7.0)]) == pytest.approx(2.0)
    # t - mean: -1 0 1, v - mean: 1 -2 1 -> 0 / 2
    assert slope_per_minute([(0, 4.0), (1, 1.0), (2, 4.0)]) == pytest.approx(0.0)
    # t - mean: -1 0 1, v - mean: -4/3 -1/3 5/3 -> 3 / 2 per second
    assert slope_per_minute([(0, 1.0), (1, 2.0), (2, 4.0)]) == pytest.approx(90.0)
    assert slope_per_minute([(0, 4.0)]) == 0.0


def test_the_mix() -> None:
    requests = mixed_requests()
    kinds = ["videos" if "videos" in r else "images" if "images" in r else "" for r in requests]
    assert [kinds.count(kind) for kind in ("", "images", "videos")] == [8, 6, 2]
    assert len({request["prompt"] for request in requests}) == len(requests)


def scripted(monkeypatch: pytest.MonkeyPatch, later: list[Any]) -> Soak:
    """A run against a server that sends a, b alone, and `later` after that."""
    alone = [fake_response(b"a", [1]), fake_response(b"b", [2])]
    transport = FakeTransport(alone)
    count = len(mixed_requests())

    class Changing(AsyncClient):
        async def _run(self, *arguments: Any):  # type: ignore[override]
            if len(transport.requests) >= count:
                transport.script = later
            async for chunk in super()._run(*arguments):
                yield chunk
            await asyncio.sleep(0.01)

    monkeypatch.setattr(module, "AsyncClient", lambda url, **_: Changing(transport=transport))
    return asyncio.run(soak("", streams=3, duration_s=0.1, process_id=os.getpid()))


def test_equal_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, [fake_response(b"a", [1]), fake_response(b"b", [2])])
    assert found.answers >= 3
    assert found.chunks == 2 * found.answers
    assert not found.mismatches
    assert not found.errors
    assert "errors: none, answers other than alone: 0" in report(found, 3)


@pytest.mark.parametrize(
    "later",
    [
        [fake_response(b"b", [2]), fake_response(b"a", [1])],  # reordered
        [fake_response(b"a", [1])],  # lost
        [fake_response(b"a", [1]), fake_response(b"c", [3])],
    ],
)
def test_other_answers_are_noticed(monkeypatch: pytest.MonkeyPatch, later: list[Any]) -> None:
    found = scripted(monkeypatch, later)
    assert found.answers == len(found.mismatches) >= 3
    assert "Question" in report(found, 3)


def test_errors_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, [RequestFailed("no")])
    assert found.answers == 0
    assert set(found.errors) == {"RequestFailed"}
    assert f"RequestFailed {found.errors['RequestFailed']}" in report(found, 3)


def test_memory_by_process() -> None:
    found = Soak(duration_s=60, answers=1)
    found.rss["tensorrt_llm (7)"] = [(float(t), int(1e6 * (100 + t))) for t in range(0, 61, 10)]
    assert "| tensorrt_llm (7) |                100.0 |          160.0 |       +60.000 |" in report(
        found, 64
    )
