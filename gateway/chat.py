"""POST /v1/chat/completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.chat_request import ChatRequest
from gateway.completion import Head, completion
from gateway.disconnect import unless_disconnected
from gateway.engine import Engine
from gateway.errors import ApiError
from gateway.event_stream import EventStream
from gateway.metrics import ANSWERS
from gateway.models import check_model
from gateway.service_request import ServiceRequest
from internvl_triton.client import Answer, answer_seeds

__all__ = ["ChatCompletions"]


class ChatCompletions:
    """max_body_bytes: of a request; a file in it takes 4/3 of its own bytes."""

    def __init__(self, engine: Engine, *, max_body_bytes: int) -> None:
        self._engine = engine
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> Response:
        chat = ChatRequest.from_json(await read_body(request, self._max_body_bytes))
        limits = await self._engine.limits()
        check_model(chat.model, limits)
        asked = ServiceRequest.from_chat(chat, max_tiles=limits.max_tiles)
        head = Head(limits.model)
        if chat.stream:
            return self._stream(request, head, chat, asked)
        work = self._complete(request, head, chat, asked)
        return await unless_disconnected(request.receive, work)

    async def _complete(
        self, request: Request, head: Head, chat: ChatRequest, asked: ServiceRequest
    ) -> Response:
        answers = await self._engine.generate_n(
            asked.messages,
            chat.n or 1,
            images=asked.images,
            videos=asked.videos,
            **asked.sampling,
        )
        request.scope[ANSWERS] = answers
        logprobs = bool(asked.sampling.get("logprobs"))
        content = await completion(self._engine, head, answers, logprobs=logprobs)
        return JSONResponse(content, headers={"X-Request-Id": head.id})

    def _stream(
        self, request: Request, head: Head, chat: ChatRequest, asked: ServiceRequest
    ) -> Response:
        answers = [Answer() for _ in range(chat.n or 1)]
        request.scope[ANSWERS] = answers
        seeds = answer_seeds(asked.sampling.pop("seed", None), len(answers))
        streams = [
            self._engine.stream(
                asked.messages,
                images=asked.images,
                videos=asked.videos,
                answer=answer,
                seed=seed,
                **asked.sampling,
            )
            for answer, seed in zip(answers, seeds, strict=True)
        ]
        return EventStream(
            self._engine,
            head,
            streams,
            answers,
            include_usage=chat.include_usage,
            logprobs=bool(asked.sampling.get("logprobs")),
        )


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError (413) before it holds more than `max_bytes`."""
    length = request.headers.get("content-length", "0")
    too_large = ApiError(
        f"the body is larger than {max_bytes} bytes; send smaller pictures", status=413
    )
    if not length.isdecimal() or int(length) > max_bytes:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)
