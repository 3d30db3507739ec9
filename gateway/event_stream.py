"""A streamed answer as server-sent events, in the order of OpenAI's:

    data: {"id": ..., "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, ...}]}
    data: {"id": ..., "choices": [{"index": 0, "delta": {"content": "A red"}, ...}]}
    data: {"id": ..., "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    data: {"id": ..., "choices": [], "usage": {...}}          with stream_options.include_usage
    data: [DONE]

The status line waits for the first chunk, so what the service refuses is an HTTP error. An error
after that is an event {"error": ...}, and the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.completion import Head, log_probs, usage
from gateway.disconnect import unless_disconnected
from gateway.engine import Engine
from gateway.errors import CLIENT_CLOSED_REQUEST, as_api_error
from gateway.metrics import STATUS
from internvl_triton.client import Answer, Chunk

__all__ = ["EventStream"]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventStream(Response):
    """streams, answers: of each choice, its chunks and what they fill."""

    media_type = "text/event-stream"

    def __init__(
        self,
        engine: Engine,
        head: Head,
        streams: Sequence[AsyncGenerator[Chunk, None]],
        answers: Sequence[Answer],
        *,
        include_usage: bool,
        logprobs: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Request-Id": head.id})
        del self.headers["Content-Length"]  # of an empty body
        self._engine = engine
        self._streams = streams
        self._answers = answers
        self._include_usage = include_usage
        self._logprobs = logprobs
        # Everything but the choice is the same in all events, so it is encoded once.
        self._before = f"data: {_encode(head.fields('chat.completion.chunk'))[:-1]},"
        self._after = ',"usage":null}\n\n' if include_usage else "}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send(scope, send))
        except ClientDisconnect:
            scope[STATUS] = CLIENT_CLOSED_REQUEST  # there is nobody to tell

    async def _send(self, scope: Scope, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(_merged(self._streams)) as chunks:
                async for index, chunk in chunks:
                    if chunk is None:
                        event = self._event(index, "{}", reason=self._answers[index].finish_reason)
                    else:
                        event = await self._piece(index, chunk)
                    if not started:
                        start = {"status": 200, "headers": self.raw_headers}
                        await send({"type": "http.response.start", **start})
                        event = self._roles() + event
                        started = True
                    if event:
                        await _body(send, event)
        except Exception as error:
            if not started:
                raise
            told = as_api_error(error)
            scope[STATUS] = told.status
            await _body(send, f"data: {_encode(told.envelope())}\n\n", last=True)
            return
        end = "data: [DONE]\n\n"
        if self._include_usage:
            end = f'{self._before}"choices":[],"usage":{_encode(usage(self._answers))}}}\n\n{end}'
        await _body(send, end, last=True)

    def _roles(self) -> str:
        delta = '{"role":"assistant","content":""}'
        return "".join(self._event(index, delta) for index in range(len(self._streams)))

    async def _piece(self, index: int, chunk: Chunk) -> str:
        if self._logprobs:
            log = _encode(await log_probs(self._engine, chunk))
        elif chunk.text:
            log = "null"
        else:  # a token that ends inside a character
            return ""
        return self._event(index, f'{{"content":{_encode(chunk.text)}}}', log=log)

    def _event(self, index: int, delta: str, *, log: str = "null", reason: str = "") -> str:
        finish = f'"{reason}"' if reason else "null"
        return (
            f'{self._before}"choices":[{{"index":{index},"delta":{delta},"logprobs":{log},'
            f'"finish_reason":{finish}}}]{self._after}'
        )


async def _body(send: Send, text: str, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


async def _merged(
    streams: Sequence[AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[tuple[int, Chunk | None], None]:
    """(index, chunk) as they come, (index, None) at each end. The first error ends all of them."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        yield 0, None
        return
    arrived: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue()
    readers = [
        asyncio.create_task(_read(index, stream, arrived)) for index, stream in enumerate(streams)
    ]
    try:
        running = len(streams)
        while running:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            running -= item is None
            yield index, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    index: int,
    stream: AsyncGenerator[Chunk, None],
    arrived: asyncio.Queue[tuple[int, Chunk | Exception | None]],
) -> None:
    try:
        async with contextlib.aclosing(stream) as chunks:
            async for chunk in chunks:
                arrived.put_nowait((index, chunk))
        arrived.put_nowait((index, None))
    except Exception as error:  # noqa: BLE001 - raised where the chunks are read
        arrived.put_nowait((index, error))
