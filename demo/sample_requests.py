"""The questions about the shipped samples, as the service takes them, with the right answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.request import ServiceRequest

__all__ = ["SAMPLES", "SampleQuestion", "sample_questions"]

SAMPLES = Path(__file__).resolve().parent / "samples"


@dataclass(frozen=True)
class SampleQuestion:
    """One turn of a conversation of samples.json. `request` holds the turns before it too.

    shows: what breaks the answer when it breaks. files: names in SAMPLES, pictures or one clip.
    """

    name: str
    shows: str
    question: str
    answer: str
    files: tuple[str, ...]
    request: ServiceRequest


def sample_questions() -> list[SampleQuestion]:
    """Every turn of every conversation; earlier turns carry their right answers."""
    text = (SAMPLES / "samples.json").read_text(encoding="utf-8")
    return [
        _question(conversation, number)
        for conversation in json.loads(text)
        for number in range(len(conversation["turns"]))
    ]


def _question(conversation: dict[str, Any], number: int) -> SampleQuestion:
    images, video = conversation["images"], conversation["video"]
    media = [{"type": "video"}] if video else [{"type": "image"} for _ in images]
    messages: list[dict[str, Any]] = []
    for turn in conversation["turns"][: number + 1]:
        parts = [] if messages else media
        text = {"type": "text", "text": turn["question"]}
        messages.append({"role": "user", "content": [*parts, text]})
        messages.append({"role": "assistant", "content": turn["answer"]})
    turn = conversation["turns"][number]
    files = (video,) if video else tuple(images)
    contents = tuple((SAMPLES / name).read_bytes() for name in files)
    return SampleQuestion(
        name=conversation["name"] if number == 0 else f"{conversation['name']}, turn {number + 1}",
        shows=conversation["shows"],
        question=turn["question"],
        answer=turn["answer"],
        files=files,
        request=ServiceRequest(
            messages=json.dumps(messages[:-1]),
            images=() if video else contents,
            videos=contents if video else (),
            sampling_parameters=dict(conversation["sampling_parameters"]),
        ),
    )
