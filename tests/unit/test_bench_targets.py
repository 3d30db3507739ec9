"""OpenAI-compatible endpoints, well and badly behaved: what a load run notes of them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from benchmarks.event_stream import read_answer
from benchmarks.openai_target import OWNER, OpenAITarget
from benchmarks.records import RequestRecord
from benchmarks.turn import Turn

JPEG = b"\xff\xd8\xff\xe0 no picture, but it begins like one"
PNG = b"\x89PNG\r\n\x1a\n the same"


def read(*pieces: bytes) -> tuple[RequestRecord, str]:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    record, text = RequestRecord(0), list[str]()
    asyncio.run(read_answer(stream(), record, text))
    return record, "".join(text)


def event(**fields: object) -> bytes:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


def delta(**fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
WHOLE = b"".join(
    [
        delta(role="assistant", content=""),
        b": comment\n\n",
        b"event: ping\ndata: {}\n\n",
        delta(content="Ä"),
        event(error=None, choices=None, usage=None),
        event(choices=[{"index": 0, "delta": None}]),
        delta(content="b"),
        b'data: {"choices": [{"index": 0,\ndata: "delta": {"content": "c"}}]}\n\n',
        USAGE,
        DONE,
    ]
)


@pytest.mark.parametrize("size", [1, 3, 50, len(WHOLE)])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_are_read_however_the_network_cuts_them(size: int, line_end: bytes) -> None:
    whole = b"\xef\xbb\xbf" + WHOLE.replace(b"\n", line_end)
    record, text = read(*(whole[start : start + size] for start in range(0, len(whole), size)))
    assert text == "Äbc"
    assert len(record.chunks_s) == 3  # a role only is no text
    assert (record.input_tokens, record.output_tokens, record.error) == (7, 3, "")


def test_the_last_event_may_lack_its_line_end() -> None:
    record, text = read(delta(content="a"), USAGE, b"data: [DONE]")
    assert (text, record.error) == ("a", "")


def test_tokens_that_nobody_counted_are_unknown() -> None:
    record, text = read(delta(content="a"), DONE)
    assert (record.input_tokens, record.output_tokens, record.error, text) == (None, None, "", "a")


def test_what_goes_wrong_in_a_stream_has_a_kind() -> None:
    assert read(delta(content="a"), USAGE)[0].error == "cut off"
    failed, _ = read(delta(content="a"), event(error={"message": "out of memory"}))
    assert failed.error == "error event"
    assert "out of memory" in failed.message


@pytest.mark.parametrize(
    "odd",
    [
        b"data: {broken\n\n",
        b"data: null\n\n",
        b"data: [1]\n\n",
        b'data: "text"\n\n',
        event(choices=3),
        event(choices=["a"]),
        delta(content=["a"]),
        delta(content=5),
        event(usage={"prompt_tokens": 7}),
        event(usage={"prompt_tokens": None, "completion_tokens": 3}),
        b'data: {"usage": {"prompt_tokens": NaN, "completion_tokens": 3}}\n\n',
    ],
    ids=bytes.decode,
)
def test_an_odd_event_fails_its_request_only(odd: bytes) -> None:
    record, _ = read(delta(content="a"), odd, USAGE, DONE)
    assert record.error == "bad event"
    assert record.message


def test_reasoning_counts_in_the_times_but_not_in_the_text() -> None:
    record, text = read(
        delta(reasoning_content="hm"), delta(reasoning="so"), delta(content="a"), USAGE, DONE
    )
    assert (len(record.chunks_s), text) == (3, "a")


Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(
    answering: Answering,
    turn: Turn,
    *,
    models: object = None,
    timeout_s: float = 5.0,
    times: int = 1,
    **options: Any,
) -> tuple[RequestRecord, str]:
    """A request (the last one) to an endpoint that answers in that way."""

    async def listing(request: web.Request) -> web.Response:
        listed = {"data": [{"id": "m", "owned_by": OWNER}]} if models is None else models
        return web.Response(text=json.dumps(listed), content_type="text/plain")

    async def run() -> tuple[RequestRecord, str]:
        app = web.Application()
        app.add_routes([web.get("/v1/models", listing)])
        app.add_routes([web.post("/v1/chat/completions", answering)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/"
        target = OpenAITarget(url, timeout_s=timeout_s, **options)
        try:
            for _ in range(times):
                record = RequestRecord(0)
                text = await target.ask(turn, record)
            return record, text
        finally:
            await target.aclose()
            await runner.cleanup()

    return asyncio.run(run())


def streaming(*pieces: bytes) -> Answering:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    return answer


ANSWER = delta(content="a"), USAGE, DONE
TEXT = Turn([{"role": "user", "content": "hello"}], max_tokens=3)


def sent(turn: Turn, **options: Any) -> tuple[dict[str, Any], str | None]:
    """The body and the key that the endpoint gets."""
    got: list[tuple[dict[str, Any], str | None]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        got.append((await request.json(), request.headers.get("Authorization")))
        return await streaming(*ANSWER)(request)

    record, _ = ask(answer, turn, **options)
    assert record.error == ""
    return got[0]


def test_what_is_sent() -> None:
    body, key = sent(TEXT, api_key="secret", extra={"ignore_eos": True})
    assert key == "Bearer secret"
    assert body == {
        "model": "m",
        "messages": TEXT.messages,
        "max_tokens": 3,
        "min_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    body, key = sent(TEXT, let_stop=True, model="another")
    assert key is None
    assert body["model"] == "another"
    assert "min_tokens" not in body


def test_files_are_data_urls_of_their_own_kind() -> None:
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": 'file-0- "q"'}]
    turn = Turn([{"role": "user", "content": content}], 3, (JPEG, PNG))
    body, _ = sent(turn)
    first, second, text = body["messages"][0]["content"]
    for part, kind, data in ((first, "jpeg", JPEG), (second, "png", PNG)):
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        assert part == {"type": "image_url", "image_url": {"url": url}}
    assert text == content[2]


def test_sampling_parameters_go_to_our_own_gateway_only() -> None:
    turn = Turn(TEXT.messages, 3, sampling={"max_tiles": 4})
    assert sent(turn)[0]["max_tiles"] == 4
    other = {"data": [{"id": "m", "owned_by": "vllm"}]}
    record, _ = ask(streaming(*ANSWER), turn, models=other)
    assert record.error == "not supported"
    assert "max_tiles" in record.message
    body, _ = sent(turn, models=other, extra={"max_dynamic_patch": 4})
    assert "max_tiles" not in body


def test_every_failure_has_a_kind() -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, text="too many")

    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError

    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(delta(content="a"))
        assert request.transport is not None
        request.transport.abort()
        return response

    record, _ = ask(busy, TEXT)
    assert (record.error, record.message) == ("HTTP 429", "too many")
    record, _ = ask(hang, TEXT, timeout_s=0.3)
    assert record.error == "RequestTimedOut"
    record, _ = ask(broken, TEXT)
    assert record.error in ("ClientPayloadError", "ClientOSError", "ServerDisconnectedError")
    for failed in (record,):
        assert failed.ended_s >= failed.sent_s > 0


async def lingering(request: web.Request) -> web.StreamResponse:
    """Answers, and keeps its stream open."""
    response = await streaming(*ANSWER)(request)
    await asyncio.sleep(30)
    return response


def test_an_answer_ends_with_done_however_long_the_connection_lasts() -> None:
    began = time.perf_counter()
    record, text = ask(lingering, TEXT)
    assert (record.error, text) == ("", "a")
    assert record.ended_s - record.sent_s < 1
    assert time.perf_counter() - began < 10


def test_an_endpoint_that_never_ends_its_stream_holds_up_its_first_caller_only() -> None:
    began = time.perf_counter()
    ask(lingering, TEXT, times=20)
    assert time.perf_counter() - began < 4  # 20 times 0.25 s is 5 s


def test_a_connection_serves_again() -> None:
    ports: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        return await streaming(*ANSWER)(request)

    ask(answer, TEXT, times=2)
    assert ports[0] == ports[1]


def test_another_length_than_asked_for_is_an_error_unless_answers_may_stop() -> None:
    longer = Turn(TEXT.messages, max_tokens=4)
    record, _ = ask(streaming(*ANSWER), longer)
    assert record.error == "wrong length"
    record, text = ask(streaming(*ANSWER), longer, let_stop=True)
    assert (record.error, text) == ("", "a")


def test_an_endpoint_that_counts_no_tokens_is_an_error_unless_answers_may_stop() -> None:
    record, _ = ask(streaming(delta(content="a"), DONE), TEXT)
    assert record.error == "no usage"
    assert "--let-stop" in record.message
    record, text = ask(streaming(delta(content="a"), DONE), TEXT, let_stop=True)
    assert (record.error, record.output_tokens, text) == ("", None, "a")


@pytest.mark.parametrize("models", [{"data": None}, [], {"data": ["x"]}, {"data": []}, "text"])
def test_an_endpoint_that_lists_no_model(models: object) -> None:
    record, _ = ask(streaming(*ANSWER), TEXT, models=models)
    assert record.error == "ServerUnavailable"
    assert "did not name a model" in record.message
    record, _ = ask(streaming(*ANSWER), TEXT, models=models, model="m")
    assert record.error == ""
