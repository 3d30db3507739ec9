"""The request's `text_input` or `messages` to a Conversation, checked against its media.

Where a turn's pictures stand is the reference's `chat()`'s choice too:

- as many `<image>` in the text as the turn has pictures: one picture at each;
- one `<image>` and several pictures: all of them there, combined;
- no `<image>`: pictures first, then clips, then the text, as the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from internvl_triton.errors import InvalidMessages
from internvl_triton.prompt import Conversation, ImageRef, Part, Turn, VideoRef

__all__ = ["IMAGE_PLACEHOLDER", "parse_conversation"]

IMAGE_PLACEHOLDER = "<image>"
_ROLES = ("system", "user", "assistant")


def parse_conversation(
    *,
    text_input: str | None,
    messages: str | None,
    num_images: int,
    num_videos: int,
    default_system: str | None = None,
) -> Conversation:
    """The conversation of one request. Every image and video is used exactly once.

    text_input: one question with all images and videos.
    messages: JSON list of chat messages; `image` and `video` parts take the next entry.
    default_system: the checkpoint's own system message, None for the template's.

    Raises InvalidMessages.
    """
    if (text_input is None) == (messages is None):
        given = "neither" if text_input is None else "both"
        raise InvalidMessages(f"give exactly one of text_input and messages; got {given}")
    if text_input is not None:
        turn = _single_turn(text_input, num_images, num_videos)
        return Conversation(turns=(turn,), system=default_system)
    assert messages is not None
    return _from_messages(messages, num_images, num_videos, default_system)


def _single_turn(text: str, num_images: int, num_videos: int) -> Turn:
    if not text.strip():
        raise InvalidMessages("text_input is empty; give a question")
    videos = [VideoRef(index) for index in range(num_videos)]
    return Turn("user", _place(text, "text_input", 0, num_images, videos))


def _place(
    text: str, where: str, first: int, num_images: int, videos: Sequence[VideoRef]
) -> tuple[Part, ...]:
    """A turn's text and media in order. first: the turn's first image, counted from 0."""
    stretches = text.split(IMAGE_PLACEHOLDER)
    placeholders = len(stretches) - 1
    if placeholders == 0:
        return (*_labelled_images(first, num_images), *videos, text)
    if placeholders == num_images:
        images = [ImageRef(first + place) for place in range(num_images)]
    elif placeholders == 1 and num_images > 1:
        images = [ImageRef(first, num_images)]
    else:
        raise InvalidMessages(
            f"{where} has {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) but the request has "
            f"{num_images} image(s) for it; give one placeholder per image, a single one to "
            "combine all images there, or none to put them first"
        )
    parts: list[Part] = [stretches[0]]
    for image, stretch in zip(images, stretches[1:], strict=True):
        parts += [image, stretch]
    return (*videos, *(part for part in parts if part != ""))


def _labelled_images(first: int, count: int) -> list[Part]:
    """`<image>` for the conversation's only picture so far, else `Image-k: <image>`.

    A label never changes in later turns, so a longer conversation keeps its prefix.
    """
    if first == 0 and count == 1:
        return [ImageRef(0), "\n"]
    parts: list[Part] = []
    for index in range(first, first + count):
        parts += [f"Image-{index + 1}: ", ImageRef(index), "\n"]
    return parts


def _from_messages(
    text: str, num_images: int, num_videos: int, default_system: str | None
) -> Conversation:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessages(f"messages is not valid JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise InvalidMessages('messages must be a non-empty JSON list of {"role", "content"}')
    system, turns = default_system, []
    images = videos = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role, content = _role_and_content(message, where)
        if role == "system":
            if number != 0:
                raise InvalidMessages(f"{where}: a system message must be the first one")
            system = _text_only(content, where, role, allow_empty=True)
        elif role == "assistant":
            turns.append(Turn("assistant", (_text_only(content, where, role),)))
        else:
            turn, new_images, new_videos = _user_turn(content, where, images, videos)
            images, videos = images + new_images, videos + new_videos
            turns.append(turn)
    if not turns or turns[-1].role != "user":
        raise InvalidMessages("messages must end with a user message to answer")
    for kind, used, given in (("image", images, num_images), ("video", videos, num_videos)):
        if used != given:
            raise InvalidMessages(
                f"messages has {used} {kind} part(s) but the request has {given} {kind}(s); "
                f'every {kind} needs one {{"type": "{kind}"}} part'
            )
    return Conversation(turns=tuple(turns), system=system)


def _role_and_content(
    message: Any, where: str
) -> tuple[Literal["system", "user", "assistant"], Any]:
    if not isinstance(message, dict):
        raise InvalidMessages(f"{where} is not an object with role and content")
    unknown = sorted(str(key) for key in message.keys() - {"role", "content", "name"})
    if unknown:
        raise InvalidMessages(
            f"{where} has an unknown key {unknown[0][:64]!r}; allowed: role, content, name"
        )
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidMessages(
            f"{where}.role is {json.dumps(role)[:64]}; allowed: {', '.join(_ROLES)}"
        )
    if "content" not in message:
        raise InvalidMessages(f"{where} has no content")
    return role, message["content"]


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidMessages(f"{where}.content must be a string or a list of parts")
    parts = []
    for number, part in enumerate(content):
        here = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "video"):
            raise InvalidMessages(
                f"{here} has type {json.dumps(kind)[:64]}; allowed: text, image, video (the "
                "picture itself is the next entry of the images input)"
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise InvalidMessages(f"{here} is a text part without a string 'text'")
        if kind == "text":
            _check_unicode(part["text"], here)
        parts.append(part)
    return parts


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half of a character, such as "\\ud83d", which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessages(
            f"{where} has an unpaired surrogate ({text[error.start]!r}), which is not a character"
        ) from error


def _text_only(content: Any, where: str, role: str, *, allow_empty: bool = False) -> str:
    parts = _parts(content, where)
    if any(part["type"] != "text" for part in parts):
        raise InvalidMessages(f"{where}: a {role} message can hold only text")
    text = "\n".join(part["text"] for part in parts)
    if not text.strip() and not allow_empty:
        raise InvalidMessages(f"{where}: the {role} message is empty; leave the turn out")
    return text


def _user_turn(content: Any, where: str, images: int, videos: int) -> tuple[Turn, int, int]:
    parts = _parts(content, where)

    def count(kind: str) -> int:
        return sum(part["type"] == kind for part in parts)

    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if not text.strip():
        raise InvalidMessages(f"{where}: the user message has no text; ask something")
    new_images, new_videos = count("image"), count("video")
    clips = [VideoRef(videos + index) for index in range(new_videos)]
    turn = Turn("user", _place(text, where, images, new_images, clips))
    return turn, new_images, new_videos
