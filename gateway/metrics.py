"""Prometheus metrics of the endpoint, and GET /metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_triton.client import Answer

__all__ = ["ANSWERS", "STATUS", "Measured", "Metrics"]

# Keys of an ASGI scope, by which a response says more than its first line.
ANSWERS = "gateway.answers"  # list[Answer]
STATUS = "gateway.status"  # of an error after the first line

_TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
CHAT_PATH = "/v1/chat/completions"


class Metrics:
    """One registry per app, so that a process can hold several apps."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "internvl_gateway_requests",
            "Chat completions by HTTP status; an error inside a stream counts as its status, a "
            "client that went away as 499.",
            ["code"],
            registry=self.registry,
        )
        self.running = Gauge(
            "internvl_gateway_requests_running",
            "Chat completions being answered.",
            registry=self.registry,
        )
        self.ttft = Histogram(
            "internvl_gateway_ttft_seconds",
            "Request to the service until its first chunk with text.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.tokens = Counter(
            "internvl_gateway_tokens",
            "Tokens of prompts (visual tokens included) and of answers.",
            ["kind"],
            registry=self.registry,
        )

    def count(self, status: int, answers: Sequence[Answer]) -> None:
        self.requests.labels(status).inc()
        for answer in answers:
            self.tokens.labels("prompt").inc(answer.num_input_tokens)
            self.tokens.labels("completion").inc(answer.num_output_tokens)
            if answer.ttft_s is not None:
                self.ttft.observe(answer.ttft_s)

    async def show(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Measured:
    """ASGI middleware: every chat completion is counted when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != CHAT_PATH:
            await self.app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.running.inc()
        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.running.dec()
            self.metrics.count(scope.get(STATUS, status), scope.get(ANSWERS, ()))
