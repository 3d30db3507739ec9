"""The body of POST /v1/chat/completions, as OpenAI's clients send it.

Fields that say how to generate are the service's `sampling_parameters`, which has OpenAI's names:
they stand in `internvl_triton.sampling` only. Here is the rest.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from gateway.errors import ApiError
from internvl_triton.sampling import SamplingParams

__all__ = ["ChatRequest", "Message", "Part", "ResponseFormat"]

MAX_N = 16
SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
# OpenAI's fields for what this endpoint does not do, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Strict):
    """detail: "low" is one tile; "auto" and "high" are what the model was trained with."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(_Strict):
    url: str


class Part(_Strict):
    """The field that has the name of `type` holds the content."""

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: ImageUrl | None = None
    video_url: VideoUrl | None = None


def _form(content: Any) -> str:
    return "<parts>" if isinstance(content, list) else "<text>"


class Message(_Strict):
    """Clients send answers back as they came: what is null in an answer is null here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")],
        Discriminator(_form),
    ]
    name: str | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    """`description`, `name` and `strict` change nothing: a schema is always enforced."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    # who asks and what for: of no use here
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    @classmethod
    def from_json(cls, body: bytes) -> ChatRequest:
        """Raises ApiError (400) naming the field, what was given and what is allowed."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from error
        request._check_fields()
        if request.stream_options is not None and not request.stream:
            raise ApiError(
                "stream_options is for stream: true only; leave it out", param="stream_options"
            )
        return request

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields that are the service's `sampling_parameters`, as they were given."""
        given = self.model_extra or {}
        return {name: value for name, value in given.items() if name in SAMPLING_FIELDS}

    def _check_fields(self) -> None:
        """Refuse what nobody would look at."""
        for name, value in (self.model_extra or {}).items():
            if name in SAMPLING_FIELDS:
                continue
            if name not in UNSUPPORTED:
                known = [*ChatRequest.model_fields, *SAMPLING_FIELDS]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ApiError(f"unknown field {name[:64]!r}{hint}", param=name[:64])
            if value is not None and value not in UNSUPPORTED[name]:
                raise ApiError(f"{name} is not supported here; leave it out", param=name)


def _refusal(error: ValidationError) -> ApiError:
    """The first problem, named as a client would name it."""
    problem = error.errors(include_url=False, include_context=False)[0]
    kind, text = problem["type"], problem["msg"]
    if kind == "json_invalid":
        return ApiError(f"the body is not valid JSON: {text.removeprefix('Invalid JSON: ')}")
    path = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    if not path:
        return ApiError("the body must be a JSON object with model and messages")
    if kind == "missing":
        return ApiError(f"{path} is missing", param=path)
    if kind == "extra_forbidden":
        return ApiError(f"unknown field {path[:200]!r}", param=path[:200])
    return ApiError(f"{path}: {text[0].lower()}{text[1:]}{_given(problem['input'])}", param=path)


def _given(value: Any) -> str:
    if isinstance(value, str):
        return f"; got {value[:64]!r}"
    if isinstance(value, dict | list):
        return f"; got {'a list' if isinstance(value, list) else 'an object'}"
    return f"; got {json.dumps(value)}"
