"""Where a load run sends its requests: our ensemble over gRPC, or an OpenAI-compatible endpoint.

Both take the same turns and fill the same records; a request's clock starts when it is handed to
the client library, with its body already made.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.records import RequestRecord
from internvl_triton.client import Answer, AsyncClient
from internvl_triton.errors import InternVLTritonError, InvalidRequest

__all__ = ["OpenAITarget", "Target", "TritonTarget", "Turn", "open_target"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One request: the messages so far and the media of the whole conversation."""

    messages: list[Message]
    max_tokens: int
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


class Target(Protocol):
    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        """The answer's text; times, tokens and the error's kind go into `record`. Never raises,
        but for a cancelled task."""
        ...

    async def model(self) -> str:
        """Whom we ask. Raises ServerUnavailable or another InternVLTritonError."""
        ...

    async def close(self) -> None: ...


class TritonTarget:
    """The `internvl` ensemble over a gRPC stream, through our own client library.

    let_stop: False asks for exactly max_tokens tokens, so that runs can be compared.
    """

    def __init__(self, url: str, *, timeout_s: float, let_stop: bool = False) -> None:
        self._client = AsyncClient(url, timeout_s=timeout_s)
        self._let_stop = let_stop

    async def model(self) -> str:
        return (await self._client.limits()).model

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        sampling = {**turn.sampling, "max_tokens": turn.max_tokens}
        if not self._let_stop:
            sampling["min_tokens"] = turn.max_tokens
        answer = Answer()
        record.sent_s = time.perf_counter()
        try:
            async for chunk in self._client.stream(
                turn.messages, images=turn.images, videos=turn.videos, answer=answer, **sampling
            ):
                if chunk.text:
                    record.chunks_s.append(time.perf_counter())
        except InternVLTritonError as error:
            record.error, record.message = type(error).__name__, str(error)
        record.ended_s = time.perf_counter()
        record.input_tokens = answer.num_input_tokens
        record.output_tokens = answer.num_output_tokens
        record.finish_reason = answer.finish_reason
        if not self._let_stop:
            _check_length(record, turn.max_tokens)
        return answer.text

    async def close(self) -> None:
        await self._client.close()


class OpenAITarget:
    """`POST {url}/chat/completions` with server-sent events.

    extra: more fields of the request body, as the endpoint knows them. Input and output tokens are
    the endpoint's own count (`stream_options.include_usage`), never the number of events.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        model: str | None = None,
        api_key: str | None = None,
        let_stop: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> None:
        import aiohttp

        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._model = model
        self._let_stop = let_stop
        self._extra = extra or {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    async def model(self) -> str:
        import aiohttp

        from internvl_triton.errors import ServerUnavailable

        if self._model is None:
            try:
                async with self._session.get(f"{self._url}/models") as response:
                    self._model = str((await response.json())["data"][0]["id"])
            except (aiohttp.ClientError, asyncio.TimeoutError, LookupError, ValueError) as error:
                raise ServerUnavailable(
                    f"{self._url}/models did not name a model ({type(error).__name__}); is it the "
                    "base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1?"
                ) from error
        return self._model

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        import aiohttp

        body = json.dumps(self._body(turn, await self.model())).encode()
        headers = {"Content-Type": "application/json"}
        text: list[str] = []
        record.sent_s = time.perf_counter()
        try:
            async with self._session.post(
                f"{self._url}/chat/completions", data=body, headers=headers
            ) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}"
                    record.message = (await response.text())[:500]
                else:
                    await _read_events(response.content.iter_any(), record, text)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            late = isinstance(error, asyncio.TimeoutError)
            record.error = "RequestTimedOut" if late else type(error).__name__
            record.message = str(error)
        record.ended_s = time.perf_counter()
        if not self._let_stop:
            _check_length(record, turn.max_tokens)
        return "".join(text)

    async def close(self) -> None:
        await self._session.close()

    def _body(self, turn: Turn, model: str) -> dict[str, Any]:
        media = [("image", "image/jpeg", data) for data in turn.images]
        media += [("video", "video/mp4", data) for data in turn.videos]
        urls = iter(
            {"type": f"{kind}_url", f"{kind}_url": {"url": _data_url(mime, data)}}
            for kind, mime, data in media
        )
        messages = [
            {
                **message,
                "content": [
                    part if part["type"] == "text" else next(urls) for part in message["content"]
                ],
            }
            if isinstance(message["content"], list)
            else message
            for message in turn.messages
        ]
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": turn.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self._let_stop:
            body["min_tokens"] = turn.max_tokens
        return {**body, **self._extra}


def open_target(
    address: str,
    *,
    timeout_s: float,
    let_stop: bool = False,
    model: str | None = None,
    api_key: str | None = None,
    extra: dict[str, Any] | None = None,
) -> Target:
    """grpc://host:port is our ensemble, http(s)://... the base URL of an OpenAI endpoint."""
    if address.startswith("grpc://"):
        if extra:
            raise InvalidRequest("further body fields are for OpenAI endpoints only")
        return TritonTarget(address.removeprefix("grpc://"), timeout_s=timeout_s, let_stop=let_stop)
    if not address.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"{address!r} is no target; give grpc://host:port (our ensemble) or "
            "http://host:port/v1 (an OpenAI-compatible endpoint)"
        )
    return OpenAITarget(
        address,
        timeout_s=timeout_s,
        model=model,
        api_key=api_key,
        let_stop=let_stop,
        extra=extra,
    )


async def _read_events(
    pieces: AsyncIterator[bytes], record: RequestRecord, text: list[str]
) -> None:
    """Fill the record from a stream of server-sent events, cut anywhere by the network."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, finished, counted = "", False, False
    async for piece in pieces:
        arrived = time.perf_counter()
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        for line in lines:
            data = line.strip().removeprefix("data:").strip()
            if not line.startswith("data:"):
                continue
            if data == "[DONE]":
                finished = True
                continue
            event = json.loads(data)
            if "error" in event:
                record.error, record.message = "error event", str(event["error"])[:500]
                return
            for choice in event.get("choices", ()):
                content = choice.get("delta", {}).get("content")
                if content:  # an event with a role only is no text
                    record.chunks_s.append(arrived)
                    text.append(content)
                record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if usage := event.get("usage"):
                record.input_tokens = usage["prompt_tokens"]
                record.output_tokens = usage["completion_tokens"]
                counted = True
    if not finished:
        record.error, record.message = "cut off", "the stream ended without [DONE]"
    elif not counted:
        record.error = "no usage"
        record.message = "the endpoint does not count tokens (stream_options.include_usage)"


def _check_length(record: RequestRecord, max_tokens: int) -> None:
    """Answers of other lengths than asked for would make every comparison wrong."""
    if not record.error and record.output_tokens != max_tokens:
        record.error = "wrong length"
        record.message = (
            f"{record.output_tokens} tokens instead of {max_tokens}: the endpoint does not know "
            "min_tokens; use --let-stop, or --extra-body with what it knows, such as ignore_eos"
        )


def _data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
