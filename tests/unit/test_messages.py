from __future__ import annotations

import json
from typing import Any

import pytest

from internvl_triton.errors import InvalidMessages
from internvl_triton.messages import parse_conversation
from internvl_triton.prompt import ImageRef, Turn, VideoRef


def parse(
    text: str | None = None, messages: Any = None, *, images: int = 0, videos: int = 0
) -> tuple[Turn, ...]:
    raw = messages if messages is None or isinstance(messages, str) else json.dumps(messages)
    return parse_conversation(
        text_input=text, messages=raw, num_images=images, num_videos=videos
    ).turns


def user(*parts: Any) -> Turn:
    return Turn("user", parts)


def test_text_input() -> None:
    assert parse("Hi") == (user("Hi"),)
    assert parse("Hi", images=1) == (user(ImageRef(0), "\n", "Hi"),)
    assert parse("Hi", images=2) == (
        user("Image-1: ", ImageRef(0), "\n", "Image-2: ", ImageRef(1), "\n", "Hi"),
    )
    assert parse("Hi", videos=1) == (user(VideoRef(0), "Hi"),)
    assert parse("<image>\nHi", images=1) == (user(ImageRef(0), "\nHi"),)
    assert parse("A <image> B <image>", images=2) == (user("A ", ImageRef(0), " B ", ImageRef(1)),)
    assert parse("See <image>!", images=3) == (user("See ", ImageRef(0, 3), "!"),)  # combined


def test_placeholders_place_the_pictures_of_their_own_turn() -> None:
    image = {"type": "image"}

    def turn(text: str, *media: dict) -> dict:
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}

    turns = parse(
        messages=[
            turn("<image>\nBoth?", image, image),
            {"role": "assistant", "content": "<image> is only a word here."},
            turn("<image> or <image>", image, {"type": "video"}, image),
        ],
        images=4,
        videos=1,
    )
    assert turns == (
        user(ImageRef(0, 2), "\nBoth?"),
        Turn("assistant", ("<image> is only a word here.",)),
        user(VideoRef(0), ImageRef(2), " or ", ImageRef(3)),
    )


def test_messages_take_the_next_image() -> None:
    turns = parse(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "One?"}, {"type": "image"}]},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Two?"}]},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Both?"},
        ],
        images=2,
    )
    assert turns == (
        user(ImageRef(0), "\n", "One?"),
        Turn("assistant", ("1",)),
        user("Image-2: ", ImageRef(1), "\n", "Two?"),
        Turn("assistant", ("2",)),
        user("Both?"),
    )


def test_a_system_message_replaces_the_templates() -> None:
    messages = json.dumps([{"role": "system", "content": ""}, {"role": "user", "content": "x"}])
    found = parse_conversation(
        text_input=None, messages=messages, num_images=0, num_videos=0, default_system="own"
    )
    assert found.system == ""
    found = parse_conversation(
        text_input="x", messages=None, num_images=0, num_videos=0, default_system="own"
    )
    assert found.system == "own"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got neither"),
        ({"text": "a", "messages": [USER]}, "got both"),
        ({"text": "  \n"}, "text_input is empty"),
        ({"text": "<image> <image>", "images": 1}, r"2 <image> placeholder\(s\).*1 image"),
        ({"text": "<image> <image>", "images": 3}, r"2 <image> placeholder\(s\).*3 image"),
        ({"text": "<image>"}, "0 image"),
        ({"messages": "{"}, "not valid JSON"),
        ({"messages": "[" * 100_000}, "not valid JSON"),
        ({"messages": []}, "non-empty JSON list"),
        ({"messages": {"role": "user"}}, "non-empty JSON list"),
        ({"messages": ["x"]}, r"messages\[0\] is not an object"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]\.role is null"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'role is "tool"; allowed: system'),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "string or a list"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"content\[0\] has type null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without a string"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "unknown key 'x'"),
        ({"messages": [{"role": "user", "content": " "}]}, "no text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "unpaired surrogate"),
        ({"messages": [USER, {"role": "assistant", "content": ""}, USER]}, "message is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "end with a user message"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "must be the first"),
        ({"messages": [USER], "images": 1}, r"0 image part\(s\).*1 image"),
        ({"messages": [USER], "videos": 1}, r"0 video part\(s\).*1 video"),
        ({"messages": [{"role": "user", "content": "<image> x"}], "images": 1}, r"\[0\].*0 image"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}, USER]},
            "assistant message can hold only text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'type "image_url"; allowed: text, image, video',
        ),
    ],
)
def test_invalid(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidMessages, match=message):
        parse(**arguments)
