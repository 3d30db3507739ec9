"""GET /v1/models and /v1/models/{model}: the one model that the service has."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.engine import Engine
from gateway.errors import ApiError
from internvl_triton.client import ServerLimits

__all__ = ["Models", "check_model"]


def check_model(name: str, limits: ServerLimits) -> None:
    """Raises ApiError (404) for a name that is not served."""
    if name != limits.model:
        raise ApiError(
            f"the model {name[:64]!r} is not served here; {limits.model!r} is",
            status=404,
            param="model",
            code="model_not_found",
        )


class Models:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        limits = await self._engine.limits()
        return JSONResponse({"object": "list", "data": [self._entry(limits)]})

    async def one(self, request: Request) -> Response:
        limits = await self._engine.limits()
        check_model(request.path_params["model"], limits)
        return JSONResponse(self._entry(limits))

    def _entry(self, limits: ServerLimits) -> dict[str, Any]:
        return {
            "id": limits.model,
            "object": "model",
            "created": self._created,
            "owned_by": "internvl-triton",
            "max_model_len": limits.max_seq_len,
        }
