"""OpenAI's request as the service takes it: messages, files, sampling parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pybase64

from gateway.chat_request import ChatRequest, Message, Part, ResponseFormat
from gateway.errors import ApiError
from internvl_triton.sampling import SamplingParams

__all__ = ["ServiceRequest"]

_DATA_URL = re.compile(r"data:[^,]{0,256}?;base64,", re.IGNORECASE)


@dataclass
class ServiceRequest:
    """Arguments of `AsyncClient.stream`."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_chat(cls, chat: ChatRequest, *, max_tiles: int) -> ServiceRequest:
        """max_tiles: of a picture for which nothing else is asked.

        Raises ApiError or InvalidSampling (400) naming the field.
        """
        request = cls(sampling=_sampling(chat))
        details: list[str | None] = []
        for number, message in enumerate(chat.messages):
            where = f"messages[{number}].content"
            request.messages.append(request._message(message, where, details))
        if "low" in details:
            _limit_tiles(request.sampling, [1 if it == "low" else max_tiles for it in details])
        SamplingParams.from_values(request.sampling)
        return request

    def _message(self, message: Message, where: str, details: list[str | None]) -> dict[str, Any]:
        """The message in the service's form; its files are added to `images` and `videos`."""
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return {"role": role, "content": message.content}
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(message.content):
            here = f"{where}[{number}]"
            _check_part(part, here)
            if part.image_url is not None:
                self.images.append(decode(part.image_url.url, f"{here}.image_url.url"))
                details.append(part.image_url.detail)
                parts.append({"type": "image"})
            elif part.video_url is not None:
                self.videos.append(decode(part.video_url.url, f"{here}.video_url.url"))
                parts.append({"type": "video"})
            else:
                parts.append({"type": "text", "text": part.text})
        return {"role": role, "content": parts}


def decode(url: str, where: str) -> bytes:
    """The file in a `data:` URL. Raises ApiError for anything else: nothing is fetched."""
    match = _DATA_URL.match(url, 0, 300)
    if match is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:", url)
        given = f"a URL that begins with {scheme[0]!r}" if scheme else "no URL"
        raise ApiError(
            f"{where} is {given}; this service fetches nothing: send the file itself as "
            "data:image/jpeg;base64,...",
            param=where,
        )
    try:
        return pybase64.b64decode(url[match.end() :], validate=True)
    except ValueError as error:
        raise ApiError(f"{where} has broken base64: {error}", param=where) from error


def _check_part(part: Part, where: str) -> None:
    for name in ("text", "image_url", "video_url"):
        given = getattr(part, name) is not None
        if given != (name == part.type):
            problem = "is for another type of part" if given else "is missing"
            raise ApiError(f"{where}.{name} {problem}", param=f"{where}.{name}")


def _sampling(chat: ChatRequest) -> dict[str, Any]:
    sampling = chat.sampling
    limit = chat.max_completion_tokens
    if limit is not None:
        if sampling.get("max_tokens") not in (None, limit):
            raise ApiError(
                "max_tokens and max_completion_tokens are the same here; give one of them",
                param="max_tokens",
            )
        sampling["max_tokens"] = limit
    if chat.response_format is not None:
        schema = _schema(chat.response_format)
        if schema is not None and sampling.get("guided_json") is not None:
            raise ApiError(
                "response_format and guided_json are the same here; give one of them",
                param="guided_json",
            )
        if schema is not None:
            sampling["guided_json"] = schema
    return sampling


def _schema(wanted: ResponseFormat) -> dict[str, Any] | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise ApiError(
            'response_format.json_schema and type "json_schema" go together',
            param="response_format.json_schema",
        )
    if wanted.type == "json_object":
        return {"type": "object"}
    return None if wanted.json_schema is None else wanted.json_schema.schema_


def _limit_tiles(sampling: dict[str, Any], tiles: list[int]) -> None:
    """`detail: "low"` is one tile for that picture."""
    for name in ("max_tiles", "total_max_tiles"):
        if sampling.get(name) is not None:
            raise ApiError(
                f'{name} and detail "low" both limit the tiles; give one of them', param=name
            )
    sampling["max_tiles"] = tiles
