"""Tells whether a running server still serves.

Triton does not: after the process of a Python model has died it stays ready, fails the requests
that need the model and leaves running streams waiting for ever (measured on 2.51).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Protocol

from internvl_triton import tensor_contract as contract
from internvl_triton.triton_server import TritonServer

__all__ = ["Canary", "ServerView", "TritonView"]

INTERVAL_S = 30.0
TIMEOUT_S = 300.0  # what a client waits for its answer by default
PROGRESS_PERIOD_S = 1.0
OVERLOADED_PAUSE_S = 5.0
# Of Triton's metrics page: what changes when any request gets ahead, on the CPU or the GPU.
PROGRESS = (
    "nv_inference_count{",
    "internvl_prompt_tokens_total{",
    "internvl_generated_tokens_total{",
    'nv_trt_llm_general_metrics{general_type="iteration_counter"',
)


class ServerView(Protocol):
    """What a canary needs to see of a server."""

    def exit_code(self) -> int | None:
        """None while it runs."""

    def models(self) -> dict[int, str]:
        """Process id -> name of every live model process."""

    def progress(self) -> str:
        """Something that differs from before when requests got ahead."""

    def ask(self, timeout_s: float) -> str:
        """Have one token generated. What went wrong, or ""."""


class Canary:
    """Ask `problem` again and again; the server has to be ready when the canary is made.

    Three things are wrong with a server: it has ended; a model's process has gone; or the smallest
    question fails twice in a row, or gets no answer in `timeout_s` while nobody else gets one
    either. The question is asked when nothing moved for `interval_s`: a busy server is not asked.
    """

    def __init__(
        self,
        server: ServerView,
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._models = server.models()
        self._question: _Question | None = None
        self._failures = 0
        self._progress = server.progress()
        self._moved = self._looked = clock()

    def problem(self) -> str | None:
        """What is wrong with the server, as one sentence without a full stop, or None."""
        code = self._server.exit_code()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            return f"tritonserver ended with {how}"
        alive = self._server.models()
        gone = sorted({model for pid, model in self._models.items() if pid not in alive})
        if gone:
            return f"a process of {', '.join(gone)} has died"
        return self._answer_problem()

    def _answer_problem(self) -> str | None:
        now = self._clock()
        if self._question is not None and self._question.done:
            problem = self._question.problem
            self._question = None
            self._moved = now
            self._failures = self._failures + 1 if problem else 0
            return problem if self._failures > 1 else None
        if now - self._looked < min(PROGRESS_PERIOD_S, self._interval_s):
            return None
        self._looked = now
        progress = self._server.progress()
        if progress != self._progress:
            self._progress, self._moved = progress, now
        if self._question is None and now - self._moved >= self._interval_s:
            self._question = _Question(self._server, self._timeout_s)
            self._moved = now
        elif self._question is not None and now - self._moved >= self._timeout_s:
            return f"nobody got an answer for {self._timeout_s:g} s, not even the smallest question"
        return None


class _Question:
    """Asks in a thread of its own, because the server may never answer."""

    def __init__(self, server: ServerView, timeout_s: float) -> None:
        self.done = False
        self.problem = ""
        # Longer than the canary waits: as long as others get ahead it goes on waiting.
        arguments = (server, 10 * timeout_s)
        threading.Thread(target=self._ask, args=arguments, daemon=True).start()

    def _ask(self, server: ServerView, timeout_s: float) -> None:
        self.problem = server.ask(timeout_s)
        self.done = True


class TritonView:
    """A TritonServer as its canary sees it. It asks over HTTP."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server

    def exit_code(self) -> int | None:
        return self._server.wait(timeout_s=0)

    def models(self) -> dict[int, str]:
        return self._server.model_processes()

    def progress(self) -> str:
        _, page = self._server.request("GET", "/metrics", port=self._server.metrics_port)
        lines = page.decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.startswith(PROGRESS))

    def ask(self, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while True:
            problem = self._ask(timeout_s)
            if not problem.startswith(contract.OVERLOADED) or time.monotonic() > deadline:
                return problem and f"a question failed: {problem}"
            time.sleep(OVERLOADED_PAUSE_S)

    def _ask(self, timeout_s: float) -> str:
        question = {
            contract.TEXT_INPUT.name: "?",
            contract.SAMPLING_PARAMETERS.name: json.dumps({"max_tokens": 1}),
        }
        path = f"/v2/models/{contract.ENSEMBLE.name}/generate"
        body = json.dumps(question).encode()
        status, reply = self._server.request("POST", path, body, timeout_s=timeout_s)
        text = reply.decode(errors="replace")  # Triton's JSON need not be UTF-8
        problem = str(json.loads(text)[contract.ERROR.name]) if status == 200 else text
        return problem or ("" if status == 200 else f"HTTP status {status}")
