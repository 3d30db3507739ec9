"""What a chat request may hold, what the service then gets, and what is refused by name."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest

from gateway.api_keys import read_api_keys
from internvl_triton.errors import InvalidRequest
from tests.unit.gateway_client import CIRCLE, HI, ScriptedService, ask, sent

PICTURE = b"\xff\xd8 a picture"
CLIP = b"\0\0\0 a clip"


def data_url(data: bytes, mime: str = "image/jpeg") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image(url: str = data_url(PICTURE), **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str = "What is it?") -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def create(service: ScriptedService, **body: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        request = {"model": "fake", "messages": HI, **body}
        await client.post("/chat/completions", body=request, cast_to=object)

    ask(service, talk)


SCHEMA = {"type": "object", "properties": {"shape": {"type": "string"}}}

# Fields of the body -> what the service gets as sampling_parameters.
VALID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": None, "stream": None, "n": None, "stop": None}, {}),
    ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
    ({"temperature": 1, "top_k": 40}, {"temperature": 1, "top_k": 40}),
    ({"stop": "END"}, {"stop": "END"}),
    ({"stop": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d"]}),
    ({"seed": 3}, {"seed": 3}),
    ({"logprobs": False}, {"logprobs": False}),
    (
        {"presence_penalty": -2, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"presence_penalty": -2, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    ),
    ({"min_tokens": 2, "max_tiles": 6}, {"min_tokens": 2, "max_tiles": 6}),
    ({"total_max_tiles": 6, "num_frames": 4}, {"total_max_tiles": 6, "num_frames": 4}),
    ({"guided_regex": "a+"}, {"guided_regex": "a+"}),
    ({"guided_choice": ["yes", "no"]}, {"guided_choice": ["yes", "no"]}),
    ({"guided_json": SCHEMA}, {"guided_json": SCHEMA}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"guided_json": {"type": "object"}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "shape", "strict": True, "schema": SCHEMA},
            }
        },
        {"guided_json": SCHEMA},
    ),
    ({"user": "u", "metadata": {"a": "b"}, "service_tier": "auto"}, {}),
    ({"safety_identifier": "s", "prompt_cache_key": "k"}, {}),
    ({"tools": [], "tool_choice": "auto", "logit_bias": {}, "store": False, "audio": None}, {}),
    ({"modalities": ["text"], "parallel_tool_calls": True}, {}),
]


@pytest.mark.parametrize(("body", "sampling"), VALID, ids=[str(body)[:60] for body, _ in VALID])
def test_valid_parameters(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    service = ScriptedService(CIRCLE)
    create(service, **body)
    asked = sent(service)
    got = {key: asked[key] for key in asked if key not in ("messages", "images", "stream")}
    assert {key: value for key, value in got.items() if value is not None} == sampling


# Fields of the body -> the field that the refusal names, and what it says.
INVALID: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"best_of": 2}, "best_of", "unknown field 'best_of'"),
    ({"temperature": 1000}, "temperature", "temperature is 1000; it must be"),
    ({"temperature": "hot"}, "temperature", 'temperature is "hot"; it must be a number'),
    ({"top_p": 0}, "top_p", "top_p is 0; it must be"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be an integer from 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens", "valid integer; got '5'"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 strings"),
    ({"stop": [""]}, "stop", "strings of 1 to"),
    ({"seed": -1}, "seed", "an integer from 0"),
    ({"n": 0}, "n", "greater than or equal to 1; got 0"),
    ({"n": 17}, "n", "less than or equal to 16; got 17"),
    ({"n": 1.5}, "n", "valid integer; got 1.5"),
    ({"stream": "yes"}, "stream", "valid boolean; got 'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "for stream: true only"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"logprobs": 5}, "logprobs", "true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"presence_penalty": 3}, "presence_penalty", "-2 up to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2 up to 2"),
    ({"top_k": -1}, "top_k", "an integer from 0"),
    ({"max_tiles": 0}, "max_tiles", "an integer from 1"),
    ({"max_tiles": 2, "total_max_tiles": 2}, None, "give one of them"),
    ({"num_frames": 0}, "num_frames", "an integer from 1"),
    ({"guided_choice": "yes"}, "guided_choice", "a list of at most"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one guide a request"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'; got 'xml'"),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "go together",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "is missing",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_json": SCHEMA},
        "guided_json",
        "give one of them",
    ),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported here; leave it out"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"store": True}, "store", "not supported"),
    ({"model": 5}, "model", "valid string; got 5"),
    ({"messages": []}, "messages", "messages: "),
    ({"messages": "Hi"}, "messages", "valid array; got 'Hi'"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].role", "got 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
    ({"messages": [*HI, {"role": "user", "x": 1}]}, "messages[1].content", "is missing"),
    (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "got a list",
    ),
    ({"messages": user({"type": "input_audio"})}, "messages[0].content[0].type", "'video_url'"),
    ({"messages": user({"text": "Hi"})}, "messages[0].content[0].type", "is missing"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0].text", "is missing"),
    (
        {"messages": user(text() | {"image_url": {"url": ""}})},
        "messages[0].content[0].image_url",
        "for another type",
    ),
    (
        {"messages": user(text(), {"type": "image_url", "image_url": "data:"})},
        "messages[0].content[1].image_url",
        "got 'data:'",
    ),
    (
        {"messages": user(image("https://example.com/a.jpg"))},
        "messages[0].content[0].image_url.url",
        "a URL that begins with 'https:'; this service fetches nothing",
    ),
    (
        {"messages": user(image("file:///etc/passwd"))},
        "messages[0].content[0].image_url.url",
        "begins with 'file:'",
    ),
    (
        {"messages": user(image("/9j/4AAQ"))},
        "messages[0].content[0].image_url.url",
        "is no URL; this service fetches nothing",
    ),
    (
        {"messages": user(image("data:image/jpeg,abc"))},
        "messages[0].content[0].image_url.url",
        "data:image/jpeg;base64,...",
    ),
    (
        {"messages": user(image("data:image/jpeg;base64,a b"))},
        "messages[0].content[0].image_url.url",
        "broken base64",
    ),
    (
        {"messages": user(image("data:image/jpeg;base64,ä"))},
        "messages[0].content[0].image_url.url",
        "broken base64",
    ),
    (
        {"messages": user(image(detail="medium"))},
        "messages[0].content[0].image_url.detail",
        "got 'medium'",
    ),
    (
        {"messages": user(image(detail="low"), text()), "max_tiles": 3},
        "max_tiles",
        'detail "low" both limit the tiles',
    ),
    (
        {"messages": user({"type": "video_url", "video_url": {"url": "http://a/b.mp4"}})},
        "messages[0].content[0].video_url.url",
        "begins with 'http:'",
    ),
]


@pytest.mark.parametrize(
    ("body", "param", "message"), INVALID, ids=[str(body)[:60] for body, _, _ in INVALID]
)
def test_invalid_parameters(body: dict[str, Any], param: str | None, message: str) -> None:
    service = ScriptedService(CIRCLE)
    with pytest.raises(openai.BadRequestError) as told:
        create(service, **body)
    assert told.value.param == param
    assert message in told.value.body["message"]
    assert len(told.value.body["message"]) < 400
    assert service.requests == []  # refused before the service is asked


def test_a_wrong_value_of_any_length_is_shown_short() -> None:
    with pytest.raises(openai.BadRequestError) as told:
        create(ScriptedService(CIRCLE), stream="A" * 1_000_000)
    assert len(told.value.body["message"]) < 200


def test_pictures_and_clips_in_order() -> None:
    service = ScriptedService(CIRCLE)
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "name": "ann", "content": [image(), text(), image(data_url(b"two"))]},
        {"role": "assistant", "content": [text("A picture.")], "refusal": None, "tool_calls": None},
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": data_url(CLIP, "video/mp4")}},
                text("And this?"),
            ],
        },
    ]
    create(service, messages=messages)
    asked = sent(service)
    assert asked["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, text(), {"type": "image"}]},
        {"role": "assistant", "content": [text("A picture.")]},
        {"role": "user", "content": [{"type": "video"}, text("And this?")]},
    ]
    assert asked["images"] == [PICTURE, b"two"]
    ((_, tensors),) = service.requests
    assert tensors["videos"].tolist() == [CLIP]


def test_low_detail_is_one_tile_for_that_picture() -> None:
    service = ScriptedService(CIRCLE)
    pictures = (image(detail="auto"), image(detail="low"), image(detail="high"), image())
    create(service, messages=user(*pictures, text()))
    assert sent(service)["max_tiles"] == [12, 1, 12, 12]  # the model's 12 for the others
    plain = ScriptedService(CIRCLE)
    create(plain, messages=user(image(detail="high"), text()))
    assert "max_tiles" not in sent(plain)


def test_files_of_api_keys(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "keys"
    file.write_text("# ann\nsk-1\n\n  sk-2  \n")
    assert read_api_keys(file) == {"sk-1", "sk-2"}
    file.write_text("# none\n")
    with pytest.raises(InvalidRequest, match="holds no key"):
        read_api_keys(file)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_api_keys(tmp_path / "missing")
