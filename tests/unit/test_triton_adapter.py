"""The adapter's pure parts."""

from __future__ import annotations

import pytest

from internvl_triton import triton_adapter
from internvl_triton.triton_adapter import CancelCheck, StopOnCancel


def test_the_server_is_asked_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(CancelCheck, "PERIOD_S", 0.25)
    monkeypatch.setattr("internvl_triton.triton_adapter.time.monotonic", lambda: now)
    asked: list[float] = []

    def is_cancelled() -> bool:
        asked.append(now)
        return now > 0.5

    check = CancelCheck(is_cancelled)
    answers = []
    for _ in range(8):
        answers.append(check())
        now += 0.125
    assert asked == [0.25, 0.5, 0.75]
    assert answers == [False] * 6 + [True, False]


class FakeRequest:
    """Cancelled or not; counts how often it was asked."""

    def __init__(self, request_id: str, *, cancelled: bool = True) -> None:
        self._request_id = request_id
        self._cancelled = cancelled
        self.asked = 0

    def request_id(self) -> str:
        return self._request_id

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self._cancelled


def test_a_stop_is_sent_again_while_answers_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that a caller uses for a second request must not be taken for the stopped first one."""
    now = 100.0
    sent: list[tuple[float, str]] = []
    monkeypatch.setattr("internvl_triton.triton_adapter.time.monotonic", lambda: now)
    monkeypatch.setattr(triton_adapter, "stop_generation", lambda _, name: sent.append((now, name)))
    stop_on_cancel = StopOnCancel(None, remember=2)
    for _ in range(3):
        for name in ("a", "b", ""):
            stop_on_cancel(FakeRequest(name))
        now += 0.75
    assert sent == [(100.0, "a"), (100.0, "b"), (101.5, "a"), (101.5, "b")]


def test_not_every_token_asks_whether_the_caller_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    sent: list[str] = []
    monkeypatch.setattr(StopOnCancel, "PERIOD_S", 0.25)
    monkeypatch.setattr("internvl_triton.triton_adapter.time.monotonic", lambda: now)
    monkeypatch.setattr(triton_adapter, "stop_generation", lambda _, name: sent.append(name))
    stop_on_cancel = StopOnCancel(None)
    chunks = [FakeRequest("a", cancelled=number > 4) for number in range(9)]
    for chunk in chunks:
        stop_on_cancel(chunk)
        now += 0.125
    assert [chunk.asked for chunk in chunks] == [1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert sent == ["a"]
