"""Who may ask: `Authorization: Bearer KEY`, checked for everything below /v1."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import ApiError
from internvl_triton.errors import InvalidRequest

__all__ = ["ApiKeys", "read_api_keys"]


def read_api_keys(path: Path) -> frozenset[str]:
    """One key a line; empty lines and lines with # in front do not count.

    Raises InvalidRequest for a file that cannot be read or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the file of API keys, {path}, cannot be read: {error}") from error
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InvalidRequest(f"the file of API keys, {path}, holds no key: one a line")
    return keys


class ApiKeys:
    """ASGI middleware. Keys are compared by digest, so the time taken tells nothing of them."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and not self._known(scope):
            error = ApiError(
                "no valid API key; send one as the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            response = JSONResponse(error.envelope(), error.status, error.headers)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
