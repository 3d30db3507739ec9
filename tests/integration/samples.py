"""A sample question, asked of a running service."""

from __future__ import annotations

import json

from demo import SampleQuestion
from internvl_triton.client import Client


def assert_right(client: Client, question: SampleQuestion) -> None:
    """The answer is the sample's, and it ended by itself."""
    request = question.request
    answer = client.generate(
        json.loads(request.messages),
        images=request.images,
        videos=request.videos,
        max_tokens=64,
        **request.sampling_parameters,
    )
    assert answer.text == question.answer
    assert answer.finish_reason == "stop"
