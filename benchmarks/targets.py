"""Where a load run sends its requests: our ensemble over gRPC, or an OpenAI-compatible endpoint.

Both take the same turns and fill the same records; a request's clock starts when it is handed to
the client library, with its body already made.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Protocol

from benchmarks.openai_target import OpenAITarget
from benchmarks.records import RequestRecord
from benchmarks.turn import Turn, check_length
from internvl_triton.client import Answer, AsyncClient
from internvl_triton.errors import InternVLTritonError, InvalidRequest

__all__ = ["Target", "TritonTarget", "open_target", "served_model"]


class Target(Protocol):
    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        """The answer's text; times, tokens and the error's kind go into `record`. Never raises,
        but for a cancelled task."""
        ...

    async def model(self) -> str:
        """Whom we ask. Raises ServerUnavailable or another InternVLTritonError."""
        ...

    async def aclose(self) -> None: ...


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
            check_length(record, turn.max_tokens)
        return answer.text

    async def aclose(self) -> None:
        await self._client.close()


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


def served_model(address: str, **options: Any) -> str:
    """Whom a target asks. options: of `open_target`. Raises an InternVLTritonError."""

    async def ask() -> str:
        async with contextlib.aclosing(open_target(address, **options)) as target:
            return await target.model()

    return asyncio.run(ask())
