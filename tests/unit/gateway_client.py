"""The gateway's app around a scripted service, asked by the real openai SDK without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx2
import openai

from gateway.app import create_app
from internvl_triton.client import AsyncClient
from internvl_triton.fake_transport import FakeTransport, fake_response
from internvl_triton.tensor_contract import OUTPUT_IDS, POSTPROCESSING

__all__ = ["CIRCLE", "HI", "ScriptedService", "ask", "sent"]

T = TypeVar("T")
HI: list[Any] = [{"role": "user", "content": "Hi"}]
CIRCLE = (fake_response(b" A red", [5, 6]), fake_response(b" circle. ", [7]))


class ScriptedService(FakeTransport):
    """Its last step spells token k as the bytes `vocabulary[k]`."""

    def __init__(self, script: Sequence[Any], vocabulary: dict[int, bytes] | None = None) -> None:
        super().__init__(script)
        self.vocabulary = vocabulary or {}

    async def infer(
        self, model: str, tensors: dict[str, Any], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, Any]:
        assert model == POSTPROCESSING.name
        (token,) = tensors[OUTPUT_IDS.name].reshape(-1).tolist()
        response = fake_response(self.vocabulary[token])
        return {name: response[name] for name in outputs}


def ask(
    service: FakeTransport,
    talk: Callable[[openai.AsyncOpenAI], Awaitable[T]],
    *,
    api_key: str = "unused",
    **options: Any,
) -> T:
    """What `talk` returns; options are those of `create_app`."""

    async def main() -> T:
        async with AsyncClient(transport=service) as engine:
            transport = httpx2.ASGITransport(create_app(engine, **options))
            async with openai.AsyncOpenAI(
                api_key=api_key,
                base_url="http://gateway/v1",
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=transport, base_url="http://gateway"),
            ) as client:
                return await talk(client)

    return asyncio.run(main())


def sent(service: ScriptedService, index: int = 0) -> dict[str, Any]:
    """What the service was asked, decoded."""
    _, tensors = service.requests[index]
    return {
        "messages": json.loads(tensors["messages"][0]),
        "images": tensors["images"].tolist() if "images" in tensors else [],
        "stream": tensors["stream"].item(),
        **json.loads(tensors["sampling_parameters"][0]),
    }
