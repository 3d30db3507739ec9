"""Every error of the endpoint in OpenAI's envelope: {"error": {message, type, param, code}}.

| raised                    | HTTP | type                  | code                |
|---------------------------|------|-----------------------|---------------------|
| InvalidRequest            | 400  | invalid_request_error | None                |
| ApiError                  | 4xx  | invalid_request_error | its own             |
| Overloaded                | 429  | rate_limit_error      | rate_limit_exceeded |
| RequestFailed, a bug      | 500  | server_error          | internal_error      |
| ServerUnavailable         | 503  | server_error          | service_unavailable |
| RequestTimedOut           | 504  | server_error          | timeout             |

A message of the service reaches the client only for what the client did wrong; what else it says
goes to the log.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from internvl_triton.errors import (
    InternVLTritonError,
    InvalidRequest,
    Overloaded,
    RequestTimedOut,
    ServerUnavailable,
)

__all__ = ["CLIENT_CLOSED_REQUEST", "EXCEPTION_HANDLERS", "ApiError", "as_api_error"]

CLIENT_CLOSED_REQUEST = 499  # for the metrics: nobody is there to read it
INVALID = "invalid_request_error"
RETRY_AFTER_S = 1
# How the service's messages begin when they name a field of the request.
_FIELD = re.compile(r"(?:sampling_parameters\.(\w+)|(messages\[\d+\][\w.\[\]]*))")
_log = logging.getLogger("gateway")


class ApiError(Exception):
    """param: the field of the body that is wrong, as `messages[0].content[1].image_url.url`."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def envelope(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_api_error(error: Exception) -> ApiError:
    """What the client is told. Logs what it is not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        field = _FIELD.match(str(error))
        message = str(error).removeprefix("sampling_parameters.")
        return ApiError(message, param=field and (field[1] or field[2]))
    if isinstance(error, HTTPException):  # no such path, or not with this method
        return ApiError(error.detail, status=error.status_code, headers=_headers(error))
    bug = not isinstance(error, InternVLTritonError)
    _log.warning("%s: %s", type(error).__name__, error, exc_info=error if bug else None)
    if isinstance(error, Overloaded):
        return ApiError(
            "too many requests are waiting; try again later",
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    status, code, message = 500, "internal_error", "the request failed; the log says why"
    if isinstance(error, ServerUnavailable):
        status, code = 503, "service_unavailable"
        message = "the model cannot be reached; it may be starting or stopping: try again later"
    elif isinstance(error, RequestTimedOut):
        status, code = 504, "timeout"
        message = "no complete answer within the time limit; lower max_tokens"
    return ApiError(message, status=status, kind="server_error", code=code)


def _headers(error: HTTPException) -> dict[str, str] | None:
    return None if error.headers is None else dict(error.headers)


async def _respond(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    told = as_api_error(error)
    return JSONResponse(told.envelope(), told.status, told.headers)


EXCEPTION_HANDLERS: dict[Any, Any] = dict.fromkeys(
    (ApiError, InternVLTritonError, HTTPException, ClientDisconnect, Exception), _respond
)
