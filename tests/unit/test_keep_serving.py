"""When a server is started again, with a server, a clock and pauses that are all made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from internvl_triton.errors import (
    InternVLTritonError,
    PortInUse,
    ServerCrashed,
    ServerFailed,
    ServerStartFailed,
)
from internvl_triton.keep_serving import POLL_S, Restarts, keep_serving


class Ended(Exception):
    """The end of a script, as Ctrl-C ends the loop."""


class ScriptedServer:
    """Each start takes the next entry: an error that it raises, or None for one that is ready."""

    def __init__(self, *starts: InternVLTritonError | None) -> None:
        self.events: list[str] = []
        self._starts = list(starts)

    def start(self) -> None:
        if not self._starts:
            raise Ended
        self.events.append("start")

    def wait_ready(self, timeout_s: float) -> None:
        self.events.append(f"wait {timeout_s:g}")
        error = self._starts.pop(0)
        if error is not None:
            raise error

    def kill(self) -> int | None:
        self.events.append("kill")
        return -9


class Pauses:
    """Stands for time.sleep, and its sum for the clock."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.all.append(seconds)

    def clock(self) -> float:
        return sum(self.all)


def run(
    server: ScriptedServer, *problems: str | None, restarts: Restarts | None = None
) -> tuple[list[str], Pauses]:
    """`problems` are what all canaries find, one after another. What was told, and the pauses."""
    found = iter(problems)
    told: list[str] = []
    pauses = Pauses()

    def watch() -> Callable[[], str | None]:
        return lambda: next(found)

    def failed(problem: str, pause_s: float) -> None:
        told.append(f"{problem}, {pause_s:g}")

    with pytest.raises(Ended):
        keep_serving(
            server,
            watch,
            ready_timeout_s=60,
            on_ready=lambda: told.append("ready"),
            on_failure=failed,
            restarts=restarts or Restarts(clock=pauses.clock),
            sleep=pauses,
        )
    return told, pauses


def test_a_failed_server_is_killed_and_started_again() -> None:
    server = ScriptedServer(None, None)
    told, pauses = run(server, None, None, "a process died", "it hangs")
    assert told == ["ready", "a process died, 1", "ready", "it hangs, 2"]
    assert server.events == ["start", "wait 60", "kill"] * 2
    assert pauses.all == [POLL_S, POLL_S, 1.0, 2.0]


@pytest.mark.parametrize("error", [ServerStartFailed("no weights"), PortInUse("port 1")])
def test_a_first_start_that_fails_is_the_callers_matter(error: InternVLTritonError) -> None:
    server = ScriptedServer(error)
    with pytest.raises(type(error)):
        keep_serving(
            server,
            lambda: lambda: None,
            ready_timeout_s=60,
            on_ready=lambda: None,
            on_failure=lambda problem, pause_s: None,
            sleep=lambda seconds: None,
        )
    assert "kill" not in server.events


def test_a_crash_while_starting_is_worth_another_try() -> None:
    told, _ = run(ScriptedServer(ServerCrashed("signal 6"), None), "it hangs")
    assert told == ["signal 6, 1", "ready", "it hangs, 2"]


def test_a_restart_that_fails_is_tried_again() -> None:
    server = ScriptedServer(None, PortInUse("port 1"), ServerStartFailed("late"), None)
    told, _ = run(server, "it hangs", "it hangs")
    assert told == ["ready", "it hangs, 1", "port 1, 2", "late, 4", "ready", "it hangs, 8"]


def test_it_gives_up_and_says_why() -> None:
    server = ScriptedServer(*[None] * 9)
    with pytest.raises(ServerFailed, match=r"3 restarts within 10 minutes.*reason: it hangs"):
        keep_serving(
            server,
            lambda: lambda: "it hangs",
            ready_timeout_s=60,
            on_ready=lambda: None,
            on_failure=lambda problem, pause_s: None,
            restarts=Restarts(3, 600, clock=lambda: 0.0),
            sleep=lambda seconds: None,
        )
    assert server.events == ["start", "wait 60", "kill"] * 4


def test_old_restarts_are_forgotten() -> None:
    now = 0.0
    restarts = Restarts(2, within_s=100, clock=lambda: now)
    assert restarts.pause_s() == 1
    now = 60
    assert restarts.pause_s() == 2
    assert restarts.pause_s() is None
    now = 100  # the first one was 100 s ago
    assert restarts.pause_s() == 2
    assert restarts.pause_s() is None
    now = 1000
    assert restarts.pause_s() == 1
