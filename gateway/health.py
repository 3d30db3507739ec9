"""GET /health/live: this process answers. GET /health/ready: the service takes requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.engine import Engine

__all__ = ["Health"]


class Health:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if await self._engine.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)
