"""Keeps a service running: starts its server again when it fails, but not for ever."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from internvl_triton.errors import PortInUse, ServerCrashed, ServerFailed, ServerStartFailed

__all__ = ["Restarts", "Serving", "keep_serving"]

POLL_S = 0.5
MAX_RESTARTS = 5
WITHIN_S = 600.0


class Serving(Protocol):
    """What is kept running; `TritonServer` is one."""

    def start(self) -> None: ...

    def wait_ready(self, timeout_s: float) -> None: ...

    def kill(self) -> int | None: ...


class Restarts:
    """At most `limit` in any `within_s` seconds, after pauses of 1, 2, 4, ... s."""

    def __init__(
        self,
        limit: int = MAX_RESTARTS,
        within_s: float = WITHIN_S,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.within_s = within_s
        self._clock = clock
        self._times: deque[float] = deque()

    def pause_s(self) -> float | None:
        """Count one restart: how long to wait before it. None when there were too many."""
        now = self._clock()
        while self._times and self._times[0] <= now - self.within_s:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return float(2 ** (len(self._times) - 1))


def keep_serving(
    server: Serving,
    watch: Callable[[], Callable[[], str | None]],
    *,
    ready_timeout_s: float,
    on_ready: Callable[[], None],
    on_failure: Callable[[str, float], None],
    restarts: Restarts | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Start the server and start it again whenever it fails; ends only by an exception.

    The server is left as it is then: the caller stops it.

    watch: called when the server is ready; gives what to ask again and again for its problem.
    on_ready: called after the first start and after every restart.
    on_failure: called with the problem and the seconds until the restart.

    Raises:
        ServerStartFailed, PortInUse: the first start failed, and not by a crash.
        ServerFailed: there were too many restarts.
    """
    restarts = restarts or Restarts()
    served = False
    while True:
        try:
            server.start()
            server.wait_ready(ready_timeout_s)
        except (ServerStartFailed, PortInUse) as error:
            if not served and not isinstance(error, ServerCrashed):
                raise
            problem = str(error)
        else:
            served = True
            on_ready()
            problem = _first_problem(watch(), sleep)
        server.kill()
        pause_s = restarts.pause_s()
        if pause_s is None:
            raise ServerFailed(
                f"the server failed again after {restarts.limit} restarts within"
                f" {restarts.within_s / 60:g} minutes, so it is not started once more;"
                f" the last reason: {problem}"
            )
        on_failure(problem, pause_s)
        sleep(pause_s)


def _first_problem(problem_of: Callable[[], str | None], sleep: Callable[[float], None]) -> str:
    while True:
        if problem := problem_of():
            return problem
        sleep(POLL_S)
