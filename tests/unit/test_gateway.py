"""The endpoint as the openai SDK sees it: answers, streams, errors, keys."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx2
import openai
import pytest

from internvl_triton.errors import (
    EngineError,
    InternVLTritonError,
    InvalidRequest,
    Overloaded,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)
from internvl_triton.fake_transport import fake_response
from tests.unit.gateway_client import CIRCLE, HI, ScriptedService, ask, sent


def create(service: ScriptedService, *, messages: list[Any] = HI, **request: Any) -> Any:
    """The whole answer, or with stream=True all its chunks."""

    async def talk(client: openai.AsyncOpenAI) -> Any:
        made = await client.chat.completions.create(
            **{"model": "fake", "messages": messages, **request}
        )
        return [chunk async for chunk in made] if request.get("stream") else made

    return ask(service, talk)


def test_a_whole_answer() -> None:
    service = ScriptedService(CIRCLE)
    answer = create(service, max_tokens=3)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "A red circle.")
    assert choice.finish_reason == "length"
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 3, 13)
    assert sent(service) | {"seed": None} == {
        "messages": HI,
        "images": [],
        "stream": False,
        "max_tokens": 3,
        "seed": None,
    }  # no temperature: the service's default, greedy
    assert create(ScriptedService(CIRCLE), max_tokens=4).choices[0].finish_reason == "stop"


def test_a_streamed_answer() -> None:
    service = ScriptedService(
        [*CIRCLE, fake_response(b"\xe4", [8]), fake_response(b"\xbd\xa0", [9])]
    )
    first, *pieces, last = create(service, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert texts == ["A red", " circle.", " 你"]  # no event for a piece of a character
    assert all(piece.choices[0].delta.role is None for piece in pieces)
    assert all(piece.choices[0].finish_reason is None for piece in (first, *pieces))
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert len({piece.id for piece in (first, *pieces, last)}) == 1
    assert sent(service)["stream"] is True


def test_usage_of_a_stream_comes_last() -> None:
    usage = {"include_usage": True}
    *pieces, last = create(ScriptedService(CIRCLE), stream=True, stream_options=usage)
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, 3)


def test_the_bytes_of_a_stream() -> None:
    async def talk(client: openai.AsyncOpenAI) -> httpx2.Response:
        body = {"model": "fake", "messages": HI, "stream": True, "max_tokens": 3}
        return await client._client.post("/v1/chat/completions", json=body)

    response = ask(ScriptedService(CIRCLE), talk)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in response.headers
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [event["choices"][0]["delta"] for event in parsed] == [
        {"role": "assistant", "content": ""},
        {"content": "A red"},
        {"content": " circle."},
        {},
    ]
    assert {event["id"] for event in parsed} == {response.headers["x-request-id"]}
    assert all("usage" not in event for event in parsed)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers(stream: bool) -> None:
    service = ScriptedService(CIRCLE)
    made = create(service, n=3, seed=7, stream=stream, temperature=1.0)
    texts = ["", "", ""]
    reasons = []
    for part in made if stream else [made]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == ["A red circle."] * 3
    assert reasons == ["stop"] * 3
    assert [sent(service, index)["seed"] for index in range(3)] == [7, 8, 9]
    if not stream:
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (10, 9)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs(stream: bool) -> None:
    rows = [{5: -0.5, 8: -1.0}, {6: -0.25, 5: -2.0}]
    service = ScriptedService(
        [fake_response(b"\xf0\x9f\x99\x82", [5, 6], log_probs=[-0.5, -0.25], top_log_probs=rows)],
        {5: b"\xf0\x9f", 6: b"\x99\x82", 8: b" A"},
    )
    made = create(service, logprobs=True, top_logprobs=2, stream=stream)
    (content,) = [
        choice.logprobs.content
        for part in (made if stream else [made])
        for choice in part.choices
        if choice.logprobs
    ]
    first, second = content
    assert (first.token, first.bytes, first.logprob) == ("\ufffd", [0xF0, 0x9F], -0.5)
    assert second.bytes == [0x99, 0x82]
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [
        ("\ufffd", -0.5),
        (" A", -1),
    ]
    without = ScriptedService([fake_response(b" A", [8], log_probs=[-0.5])], {8: b" A"})
    answer = create(without, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert create(ScriptedService(CIRCLE)).choices[0].logprobs is None


# The service's error -> HTTP status, OpenAI's type and code, and what the client may read.
FAILURES = [
    (InvalidRequest("image 2 is broken"), 400, "invalid_request_error", None, "image 2 is broken"),
    (Overloaded("at 10.0.0.1:8001"), 429, "rate_limit_error", "rate_limit_exceeded", "try again"),
    (RequestFailed("/srv/model.py: no"), 500, "server_error", "internal_error", "log says why"),
    (EngineError("/srv/model.py: no"), 500, "server_error", "internal_error", "log says why"),
    (ServerUnavailable("at 10.0.0.1"), 503, "server_error", "service_unavailable", "try again"),
    (RequestTimedOut("/srv: 300 s"), 504, "server_error", "timeout", "lower max_tokens"),
]
CASES = [pytest.param(*case, id=type(case[0]).__name__) for case in FAILURES]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code", "message"), CASES)
def test_failures(
    error: InternVLTritonError, status: int, kind: str, code: str | None, message: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as told:
        create(ScriptedService([error]), stream=stream)
    assert told.value.status_code == status
    assert told.value.response.headers.get("retry-after") == ("1" if status == 429 else None)
    assert (told.value.type, told.value.code) == (kind, code)
    assert message in told.value.body["message"]
    assert not any(secret in told.value.response.text for secret in ("/srv", "10.0.0.1", "Traceb"))


@pytest.mark.parametrize(("error", "status", "kind", "code", "message"), CASES)
def test_failures_inside_a_stream(
    error: InternVLTritonError, status: int, kind: str, code: str | None, message: str
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> tuple[list[str], openai.APIError, str]:
        texts: list[str] = []
        raw: dict[str, Any] = {"model": "fake", "messages": HI, "stream": True}

        async def read() -> None:
            async for chunk in await client.chat.completions.create(**raw):
                texts.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError) as told:
            await read()
        text = (await client._client.post("/v1/chat/completions", json=raw)).text
        return texts, told.value, text + (await client._client.get("/metrics")).text

    texts, told, text = ask(ScriptedService([*CIRCLE, error]), talk)
    assert texts == ["", "A red", " circle."]
    assert (told.type, told.code) == (kind, code)
    assert message in told.message
    assert "[DONE]" not in text
    assert f'internvl_gateway_requests_total{{code="{status}"}} 2.0' in text
    assert not any(secret in text for secret in ("/srv", "10.0.0.1", "Traceb"))


def test_an_error_names_the_services_field() -> None:
    for said, param in (
        ("sampling_parameters.top_k is 5; it must be 0", "top_k"),
        ("messages[1]: the user message has no text; ask something", "messages[1]"),
        ("the request has 80 images", None),
    ):
        with pytest.raises(openai.BadRequestError) as told:
            create(ScriptedService([InvalidRequest(said)]))
        assert told.value.param == param
        assert told.value.body["message"] == said.removeprefix("sampling_parameters.")


def test_a_bug_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Before the first byte Starlette answers and raises again, for the server's log."""
    with pytest.raises(ZeroDivisionError):
        create(ScriptedService([ZeroDivisionError("/srv/secret")]))
    texts = [record.exc_text or str(record.exc_info) for record in caplog.records]
    assert any("ZeroDivisionError" in text for text in texts)
    with pytest.raises(openai.APIError) as told:
        create(ScriptedService([*CIRCLE, ZeroDivisionError("/srv/secret")]), stream=True)
    assert told.value.code == "internal_error"
    assert "secret" not in str(told.value)


def test_another_model_is_not_found() -> None:
    with pytest.raises(openai.NotFoundError) as told:
        create(ScriptedService(CIRCLE), model="gpt-4o")
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    assert "'fake' is" in told.value.body["message"]


def test_models() -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        listed = await client.models.list()
        assert [model.id for model in listed.data] == ["fake"]
        one = await client.models.retrieve("fake")
        assert (one.object, one.max_model_len) == ("model", 1000)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")

    ask(ScriptedService([]), talk)


def test_health_metrics_and_other_paths() -> None:
    service = ScriptedService(CIRCLE)

    async def talk(client: openai.AsyncOpenAI) -> None:
        web = client._client
        await client.chat.completions.create(model="fake", messages=HI)
        assert (await web.get("/health/live")).status_code == 200
        assert (await web.get("/health/ready")).status_code == 200
        service.ready = False
        assert (await web.get("/health/ready")).status_code == 503
        metrics = (await web.get("/metrics")).text
        assert 'internvl_gateway_requests_total{code="200"} 1.0' in metrics
        assert 'internvl_gateway_tokens_total{kind="prompt"} 10.0' in metrics
        assert 'internvl_gateway_tokens_total{kind="completion"} 3.0' in metrics
        assert "internvl_gateway_ttft_seconds_count 1.0" in metrics
        assert "internvl_gateway_requests_running 0.0" in metrics
        for method, path, status in (("GET", "/v1/completions", 404), ("PUT", "/v1/models", 405)):
            response = await web.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["type"] == "invalid_request_error"

    ask(service, talk)


def test_api_keys() -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        assert (await client._client.get("/health/ready")).status_code == 200
        answer = await client.chat.completions.create(model="fake", messages=HI)
        await client.models.list()
        return answer.choices[0].message.content

    keys = {"sk-one", "sk-two"}
    for key in keys:
        assert ask(ScriptedService(CIRCLE), talk, api_key=key, api_keys=keys) == "A red circle."
    for key in ("sk-", "sk-one2", "Sk-one"):
        service = ScriptedService(CIRCLE)
        with pytest.raises(openai.AuthenticationError) as told:
            ask(service, talk, api_key=key, api_keys=keys)
        assert told.value.code == "invalid_api_key"
        assert told.value.response.headers["www-authenticate"] == "Bearer"
        assert service.requests == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(announced: bool) -> None:
    body = json.dumps({"model": "fake", "messages": HI}).encode()

    async def pieces():  # type: ignore[no-untyped-def]
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    async def talk(client: openai.AsyncOpenAI) -> httpx2.Response:
        content = body if announced else pieces()
        return await client._client.post("/v1/chat/completions", content=content)

    assert ask(ScriptedService(CIRCLE), talk, max_body_bytes=len(body)).status_code == 200
    refused = ask(ScriptedService(CIRCLE), talk, max_body_bytes=len(body) - 1)
    assert refused.status_code == 413
    assert f"larger than {len(body) - 1} bytes" in refused.json()["error"]["message"]


def test_not_json() -> None:
    async def talk(client: openai.AsyncOpenAI) -> list[str]:
        bodies = (b"", b"{", b"[]", b"\xff", b'{"model": "\\ud83d"}', b"[" * 10_000)
        responses = [
            await client._client.post("/v1/chat/completions", content=body) for body in bodies
        ]
        assert {response.status_code for response in responses} == {400}
        return [response.json()["error"]["message"] for response in responses]

    messages = ask(ScriptedService(CIRCLE), talk)
    assert messages[2] == "the body must be a JSON object with model and messages"
    assert all("not valid JSON" in message for message in messages[:2] + messages[3:])


def test_numbers_that_json_does_not_have() -> None:
    async def talk(client: openai.AsyncOpenAI) -> httpx2.Response:
        body = json.dumps({"model": "fake", "messages": HI, "temperature": math.nan})
        return await client._client.post("/v1/chat/completions", content=body.encode())

    assert ask(ScriptedService(CIRCLE), talk).json()["error"]["param"] == "temperature"
