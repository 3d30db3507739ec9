"""An OpenAI-compatible endpoint as the target of a load run: ours, LMDeploy, vLLM, SGLang."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from benchmarks.event_stream import read_answer
from benchmarks.pictures import media_type
from benchmarks.records import RequestRecord
from benchmarks.turn import Turn, check_length
from internvl_triton.errors import ServerUnavailable

__all__ = ["OpenAITarget"]

OWNER = "internvl-triton"  # of the models that our own gateway lists
_LIST_TIMEOUT_S = 20.0
_ONLY_WHOSE_TIMEOUT_S = 5.0  # where the model is named and the list only says whose endpoint it is
_REST_TIMEOUT_S = 0.25  # for what comes behind an answer
_NO_REST_TIMEOUT_S = 0.002  # once nothing came


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
        self._named = model
        self._served: tuple[str, bool] | None = None  # the model, and whether it is our gateway's
        self._lock = asyncio.Lock()
        self._timeout_s = timeout_s
        self._let_stop = let_stop
        self._extra = extra or {}
        self._rest_timeout_s = _REST_TIMEOUT_S
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    async def model(self) -> str:
        return (await self._asked())[0]

    async def _asked(self) -> tuple[str, bool]:
        async with self._lock:
            if self._served is None:
                self._served = await self._read_list()
            return self._served

    async def _read_list(self) -> tuple[str, bool]:
        import aiohttp

        longest = _ONLY_WHOSE_TIMEOUT_S if self._named else _LIST_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(min(longest, self._timeout_s))
        try:
            async with self._session.get(f"{self._url}/models", timeout=timeout) as response:
                first = (await response.json(content_type=None))["data"][0]
                return self._named or str(first["id"]), first.get("owned_by") == OWNER
        except (
            aiohttp.ClientError,
            asyncio.TimeoutError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            if self._named:
                return self._named, False  # whoever names the model need not list it
            raise ServerUnavailable(
                f"{self._url}/models did not name a model ({type(error).__name__}); is it the "
                "base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1? "
                "`make bench` takes --endpoint-model for one that is not listed"
            ) from error

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        import aiohttp

        try:
            model, ours = await self._asked()
        except ServerUnavailable as error:
            record.sent_s = record.ended_s = time.perf_counter()
            record.error, record.message = type(error).__name__, str(error)
            return ""
        if turn.sampling and not (ours or self._extra):
            record.sent_s = record.ended_s = time.perf_counter()
            record.error = "not supported"
            record.message = (
                f"{', '.join(turn.sampling)} of the workload can be told to our own gateway only, "
                "which this endpoint is not; leave clips and --max-tiles out, or say it with "
                "--extra-body in the endpoint's own words"
            )
            return ""
        body = self._body(turn, model, turn.sampling if ours else {})
        headers = {"Content-Type": "application/json"}
        text: list[str] = []
        record.sent_s = time.perf_counter()
        try:
            async with self._session.post(
                f"{self._url}/chat/completions", data=body, headers=headers
            ) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}"
                    record.message = (await response.text(errors="replace"))[:500]
                else:
                    await read_answer(response.content.iter_any(), record, text)
                    # To the end, so that the connection can serve again. Where an endpoint does
                    # not end it, no further caller waits for that.
                    await asyncio.wait_for(response.content.read(), self._rest_timeout_s)
                    self._rest_timeout_s = _REST_TIMEOUT_S
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            if record.ended_s:
                self._rest_timeout_s = _NO_REST_TIMEOUT_S
            else:
                late = isinstance(error, asyncio.TimeoutError)
                record.error = "RequestTimedOut" if late else type(error).__name__
                record.message = str(error)
        record.ended_s = record.ended_s or time.perf_counter()
        if not self._let_stop:
            check_length(record, turn.max_tokens)
        return "".join(text)

    async def aclose(self) -> None:
        await self._session.close()

    def _body(self, turn: Turn, model: str, sampling: dict[str, Any]) -> bytes:
        files = [("image", data) for data in turn.images]
        files += [("video", data) for data in turn.videos]
        marks = [f"file-{number}-{uuid4().hex}" for number in range(len(files))]
        urls = iter(
            {"type": f"{kind}_url", f"{kind}_url": {"url": mark}}
            for (kind, _), mark in zip(files, marks, strict=True)
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
        text = json.dumps({**body, **sampling, **self._extra})
        return _with_files(text, marks, [data for _, data in files])


def _with_files(text: str, marks: Sequence[str], files: Sequence[bytes]) -> bytes:
    """The body, with each file as a data: URL in the place of its mark.

    Megabytes through `json.dumps` would hold up the clocks of the other requests.
    """
    import pybase64

    parts = []
    for mark, data in zip(marks, files, strict=True):
        before, text = text.split(mark)
        parts += [before.encode(), f"data:{media_type(data)};base64,".encode()]
        parts.append(pybase64.b64encode(data))
    return b"".join([*parts, text.encode()])
