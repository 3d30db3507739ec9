"""A client that goes away ends its generation, whenever it goes; the app without any server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.app import create_app
from internvl_triton.client import AsyncClient
from internvl_triton.fake_transport import FakeTransport, fake_response

HANGING = 60.0
SLOW_FIRST = (HANGING, fake_response(b"a", [1]))
SLOW_SECOND = (fake_response(b"a", [1]), HANGING, fake_response(b"b", [2]))


def gone_after(
    service: FakeTransport, messages: int, *, whole_body: bool = True, **body: Any
) -> list[dict[str, Any]]:
    """Messages that the app sent to a client that goes away after so many of them (0: at once, but
    not before the service was asked)."""
    content = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "Hi"}], **body})
    got: list[dict[str, Any]] = []

    async def main() -> None:
        leaving = asyncio.Event()
        incoming = [{"type": "http.request", "body": content.encode(), "more_body": not whole_body}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            if whole_body:
                await leaving.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            got.append(message)
            if messages and len(got) == messages:
                leaving.set()

        async def leave_once_asked() -> None:
            while not service.requests:
                await asyncio.sleep(0.001)
            leaving.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        async with AsyncClient(transport=service) as engine:
            app = create_app(engine)
            watcher = asyncio.create_task(leave_once_asked()) if not messages else None
            await asyncio.wait_for(app(scope, receive, send), timeout=10)
            if watcher is not None:
                watcher.cancel()

    asyncio.run(main())
    return got


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_chunk(stream: bool, n: int) -> None:
    service = FakeTransport(SLOW_FIRST)
    gone_after(service, 0, stream=stream, n=n)
    asked = [request_id for request_id, _ in service.requests]
    assert asked
    assert sorted(service.stopped) == sorted(asked)
    assert service.closed_streams == len(asked)


@pytest.mark.parametrize("n", [1, 2])
def test_in_the_middle_of_a_stream(n: int) -> None:
    service = FakeTransport(SLOW_SECOND)
    got = gone_after(service, 2, stream=True, n=n)
    assert got[0]["status"] == 200
    assert all(message["more_body"] for message in got[1:])  # cut off, not ended
    assert sorted(service.stopped) == sorted(request_id for request_id, _ in service.requests)
    assert len(service.stopped) == n


def test_before_its_body_is_complete() -> None:
    service = FakeTransport(SLOW_FIRST)
    got = gone_after(service, 2, whole_body=False)
    assert got[0]["status"] == 499
    assert service.requests == []
