"""What the canary makes of a server that is made up; its clock moves by hand."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, Queue

import pytest

from internvl_triton.canary import Canary

MODELS = {11: "preprocessing", 12: "preprocessing", 13: "tensorrt_llm"}
INTERVAL_S, TIMEOUT_S = 30.0, 300.0


class MadeUpServer:
    def __init__(self) -> None:
        self.now = 0.0
        self.code: int | None = None
        self.alive = dict(MODELS)
        self.answered = 0
        self.asked = threading.Semaphore(0)
        self.replies: Queue[str] = Queue()

    def exit_code(self) -> int | None:
        return self.code

    def models(self) -> dict[int, str]:
        return dict(self.alive)

    def progress(self) -> str:
        return str(self.answered)

    def ask(self, timeout_s: float) -> str:
        self.asked.release()
        with contextlib.suppress(Empty):  # a test that ends without a reply
            return self.replies.get(timeout=60)
        return "nobody replied"


@pytest.fixture
def server() -> MadeUpServer:
    return MadeUpServer()


@pytest.fixture
def canary(server: MadeUpServer) -> Canary:
    return Canary(server, interval_s=INTERVAL_S, timeout_s=TIMEOUT_S, clock=lambda: server.now)


def was_asked(server: MadeUpServer, *, within_s: float = 30) -> bool:
    return server.asked.acquire(timeout=within_s)


def after_reply(canary: Canary, server: MadeUpServer, reply: str) -> str | None:
    """What the canary says when the question that it has asked was replied to."""
    server.replies.put(reply)
    deadline = time.monotonic() + 30
    while canary._question is not None and time.monotonic() < deadline:
        problem = canary.problem()
        if problem:
            return problem
    return canary.problem()


def wait(canary: Canary, server: MadeUpServer, seconds: float) -> str | None:
    server.now += seconds
    return canary.problem()


def test_a_server_that_answers_has_no_problem(server: MadeUpServer, canary: Canary) -> None:
    assert wait(canary, server, INTERVAL_S - 1) is None
    assert not was_asked(server, within_s=0)
    for _ in range(3):
        assert wait(canary, server, INTERVAL_S) is None
        assert was_asked(server)
        assert after_reply(canary, server, "") is None


@pytest.mark.parametrize(("code", "how"), [(1, "exit code 1"), (-11, "signal 11")])
def test_an_ended_server(server: MadeUpServer, canary: Canary, code: int, how: str) -> None:
    server.code = code
    assert canary.problem() == f"tritonserver ended with {how}"


def test_a_dead_model_process_is_named(server: MadeUpServer, canary: Canary) -> None:
    del server.alive[12]  # one of two
    assert canary.problem() == "a process of preprocessing has died"
    server.alive.clear()
    assert canary.problem() == "a process of preprocessing, tensorrt_llm has died"


def test_two_failed_questions_in_a_row_are_a_problem(server: MadeUpServer, canary: Canary) -> None:
    for reply, problem in (("no", None), ("", None), ("no", None), ("no", "no")):
        assert wait(canary, server, INTERVAL_S) is None
        assert was_asked(server)
        assert after_reply(canary, server, reply) == problem


def test_a_busy_server_is_not_asked(server: MadeUpServer, canary: Canary) -> None:
    for _ in range(20):
        server.answered += 1
        assert wait(canary, server, INTERVAL_S - 1) is None
    assert not was_asked(server, within_s=0)


@pytest.fixture
def asked(server: MadeUpServer, canary: Canary) -> Callable[[float], str | None]:
    """A canary that has asked and got no reply yet; takes the seconds that pass."""
    wait(canary, server, INTERVAL_S)
    assert was_asked(server)
    return lambda seconds: wait(canary, server, seconds)


def test_no_answer_for_too_long_is_a_problem(asked: Callable[[float], str | None]) -> None:
    assert asked(TIMEOUT_S - 1) is None
    assert asked(1) == "nobody got an answer for 300 s, not even the smallest question"


def test_a_question_may_wait_behind_others(
    server: MadeUpServer, asked: Callable[[float], str | None]
) -> None:
    for _ in range(5):
        assert asked(TIMEOUT_S - 1) is None
        server.answered += 1
    assert asked(1) is None
    assert asked(TIMEOUT_S) is not None
