"""The ASGI application around one engine."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from gateway.api_keys import ApiKeys
from gateway.chat import ChatCompletions
from gateway.engine import Engine
from gateway.errors import EXCEPTION_HANDLERS
from gateway.health import Health
from gateway.metrics import CHAT_PATH, Measured, Metrics
from gateway.models import Models
from gateway.page import Page
from gateway.samples import Samples

__all__ = ["MAX_BODY_BYTES", "create_app"]

MAX_BODY_BYTES = 64 * 2**20


def create_app(
    engine: Engine,
    *,
    api_keys: Collection[str] = (),
    samples: Path | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """api_keys: whoever asks below /v1 has to send one of them; without any, everybody may.

    samples: a directory with samples.json, for the page. Raises InvalidRequest for another one.
    """
    metrics = Metrics()
    models = Models(engine)
    health = Health(engine)
    chat = ChatCompletions(engine, max_body_bytes=max_body_bytes)
    routes = [
        Route("/", Page().show),
        Route(CHAT_PATH, chat.create, methods=["POST"]),
        Route("/v1/models", models.list),
        Route("/v1/models/{model}", models.one),
        Route("/health/live", health.live),
        Route("/health/ready", health.ready),
        Route("/metrics", metrics.show),
    ]
    if samples is not None:
        offered = Samples(samples)
        routes += [Route("/samples", offered.list), Route("/samples/{name}", offered.file)]
    middleware = [Middleware(Measured, metrics=metrics)]
    if api_keys:
        middleware.append(Middleware(ApiKeys, keys=api_keys))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=EXCEPTION_HANDLERS,
    )
