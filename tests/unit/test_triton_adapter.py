"""The adapter's pure parts."""

from __future__ import annotations

import pytest

from internvl_triton.triton_adapter import CancelCheck


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
