"""The adapter's pure parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_triton import triton_adapter
from internvl_triton.triton_adapter import CancelCheck, SmallTensors, StopOnCancel


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
    stop_on_cancel = StopOnCancel(None)
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


def test_many_streams_ask_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """All together PER_SECOND times a second, everybody in turn; who has ended does not count."""
    now = 100.0
    monkeypatch.setattr("internvl_triton.triton_adapter.time.monotonic", lambda: now)
    stop_on_cancel = StopOnCancel(None)

    def questions(names: list[str], seconds: int) -> list[int]:
        nonlocal now
        streams = [FakeRequest(name, cancelled=False) for name in names]
        for _ in range(50 * seconds):
            for stream in streams:
                stop_on_cancel(stream)
            now += 0.02
        return [stream.asked for stream in streams]

    names = [f"many {number}" for number in range(200)]
    questions(names, seconds=4)  # they have all just begun
    many = questions(names, seconds=10)
    assert max(many) - min(many) <= 1
    assert sum(many) / 10 == pytest.approx(StopOnCancel.PER_SECOND, rel=0.15)
    now += 5.0
    (alone,) = questions(["alone"], seconds=10)
    assert alone == pytest.approx(10 / StopOnCancel.PERIOD_S, rel=0.25)


class CountedTensors:
    """`pb_utils.Tensor`, counted."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def Tensor(self, name: str, value: NDArray[Any]) -> tuple[str, NDArray[Any]]:  # noqa: N802
        self.made.append(name)
        return name, value


@pytest.mark.parametrize(
    "value",
    [
        np.array([[[7]]], np.int32),
        np.array([7], np.int32),
        np.array([b"a token"], np.object_),
        np.array([b""], np.object_),
        np.array([[True]]),
        np.array([1.0], np.float32),
        np.array([b"x" * 1000], np.object_),
        np.arange(3, dtype=np.int32),
        np.zeros(0, np.int32),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_small_tensors_are_those_that_were_asked_for(value: NDArray[Any]) -> None:
    backend = CountedTensors()
    tensor = SmallTensors(backend)
    for name in ("a", "b", "a"):
        given, array = tensor(name, value.copy())
        assert (given, array.dtype, array.shape) == (name, value.dtype, value.shape)
        assert array.tolist() == value.tolist()
    small = value.size == 1 and value.dtype in (np.int32, np.object_)
    kept = small and len(str(value.item())) < 100
    assert backend.made == (["a", "b"] if kept else ["a", "b", "a"])


def test_small_tensors_differ_in_name_number_shape_and_type() -> None:
    tensor = SmallTensors(CountedTensors())
    given = [
        ("a", np.array([1], np.int32)),
        ("a", np.array([[1]], np.int32)),
        ("a", np.array([2], np.int32)),
        ("b", np.array([1], np.int32)),
        ("a", np.array([b"1"], np.object_)),
    ]
    found = [tensor(name, value) for name, value in given + given]
    assert len({id(each) for each in found}) == len(given)
    for (name, value), (found_name, array) in zip(given + given, found, strict=True):
        assert (name, value.dtype, value.shape) == (found_name, array.dtype, array.shape)
        assert value.tolist() == array.tolist()


def test_small_tensors_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallTensors, "MAX_TENSORS", 4)
    backend = CountedTensors()
    tensor = SmallTensors(backend)
    for number in (0, 1, 2, 3, 4, 4, 0):
        tensor("a", np.array([number], np.int32))
    assert len(backend.made) == 6  # the first one was given up for the fifth
