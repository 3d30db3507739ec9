"""Over the running service: stop strings, the image budget, the cost of a request, n answers."""

from __future__ import annotations

import asyncio
import json
import urllib.error

import numpy as np
import pytest

from benchmarks.soak import report, soak
from internvl_triton.client import Answer
from internvl_triton.errors import InvalidRequest
from tests.integration.conftest import Service
from tests.integration.pictures import clip, encoded, picture
from tests.integration.test_ensemble_http import parsed, post
from tests.reference import reference_ids, reference_prompt, reference_tiles

pytestmark = pytest.mark.triton

QUESTION = "What is in the picture?"
LONG = 48


@pytest.fixture
def answer(service: Service) -> Answer:
    return service.client.generate(QUESTION, max_tokens=LONG, min_tokens=LONG)


def borders(service: Service, answer: Answer) -> list[bytes]:
    """The bytes of each token, as the server sends them."""
    events = post(
        service,
        "generate_stream",
        {
            "text_input": QUESTION,
            "stream": True,
            "sampling_parameters": json.dumps({"max_tokens": LONG, "min_tokens": LONG}),
        },
    ).split(b"\n\n")[:-1]
    return [parsed(event.removeprefix(b"data: "))["text_output"] for event in events]


def stop_across_tokens(pieces: list[bytes]) -> str:
    """Text of three characters that begins in one token and ends in another, not at the start."""
    data = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    for end in ends[8:-8]:
        for begin in range(end - 2, end):
            text = data[begin : begin + 3]
            if text.isascii() and text.decode().isprintable() and data.find(text) > 8:
                return text.decode()
    raise AssertionError("no token of this answer ends inside plain text")


def test_a_stop_string_across_tokens(service: Service, answer: Answer) -> None:
    pieces = borders(service, answer)
    stop = stop_across_tokens(pieces)
    expected = b"".join(pieces).split(stop.encode())[0]
    ends = np.cumsum([len(piece) for piece in pieces])
    num_tokens = int((ends < len(expected) + len(stop)).sum()) + 1

    found = service.client.generate(QUESTION, max_tokens=2000, stop=["never said", stop])
    assert found.text == expected.decode(errors="replace").strip()
    assert found.token_ids == answer.token_ids[:num_tokens]
    assert found.finish_reason == "stop"
    streamed = "".join(
        chunk.text for chunk in service.client.stream(QUESTION, max_tokens=2000, stop=stop)
    )
    assert streamed == found.text

    sampling = json.dumps({"max_tokens": LONG, "stop": stop})
    body = {"id": "curl 1", "text_input": QUESTION, "sampling_parameters": sampling}
    whole = parsed(post(service, "generate", body))
    assert whole["text_output"] == expected
    assert whole["stopped"] is True
    assert whole["output_ids"] == answer.token_ids[:num_tokens]
    sampling = json.dumps({"max_tokens": 2000, "min_tokens": 1, "stop": stop})
    body |= {"sampling_parameters": sampling, "stream": True}
    events = post(service, "generate_stream", body).split(b"\n\n")[:-1]
    chunks = [parsed(event.removeprefix(b"data: ")) for event in events]
    assert b"".join(chunk["text_output"] for chunk in chunks) == expected
    assert len(chunks) < 1000  # the generation was told to stop, by postprocessing alone


def test_a_stop_string_before_min_tokens_does_not_count(service: Service, answer: Answer) -> None:
    pieces = borders(service, answer)
    stop = stop_across_tokens(pieces)
    found = service.client.generate(QUESTION, max_tokens=LONG, min_tokens=LONG, stop=stop)
    assert found.token_ids == answer.token_ids


def test_a_stop_needs_an_id(service: Service) -> None:
    body = {"text_input": "Hi", "sampling_parameters": '{"stop": "x", "max_tokens": 4}'}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(service, "generate", body)
    assert caught.value.code == 400
    assert "stop needs a request id" in caught.value.read().decode()


def test_what_a_request_costs(service: Service) -> None:
    images = [picture(1000, 1000), picture(900, 450, seed=1)]
    files = [encoded(image) for image in images]
    frames = [picture(64, 48, seed=seed) for seed in range(4)]
    budgets = {"max_tiles": [4, 12]}, {"total_max_tiles": 24}, {"total_max_tiles": 2}, {}
    for sampling, limits in zip(budgets, [(4, 12), (12, 12), (1, 1), (12, 12)], strict=True):
        tiles = [
            len(reference_tiles(image, max_num=limit))
            for image, limit in zip(images, limits, strict=True)
        ]
        text = reference_prompt([], f"Image-1: <image>\nImage-2: <image>\n{QUESTION}", tiles)
        cost = service.client.count_tokens(QUESTION, images=files, stop="x", **sampling)
        assert cost.tiles_per_image == tuple(tiles)
        assert cost.num_visual_tokens == 256 * sum(tiles)
        assert cost.num_input_tokens == len(reference_ids(service.checkpoint, text))
    cost = service.client.count_tokens(QUESTION, videos=[clip(frames)], num_frames=3)
    assert cost.tiles_per_image == (1, 1, 1)
    small = {"images": files, "max_tiles": [1, 1], "max_tokens": 2}
    answer = service.client.generate(QUESTION, **small)
    assert (
        answer.num_input_tokens == service.client.count_tokens(QUESTION, **small).num_input_tokens
    )
    with pytest.raises(InvalidRequest, match="exceed the limit"):
        service.client.count_tokens(QUESTION, max_tokens=40_000)


def test_n_answers(qwen2: Service) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 8, "min_tokens": 8}
    many = qwen2.client.generate_n(QUESTION, 3, seed=7, **sampling)
    each = [qwen2.client.generate(QUESTION, seed=seed, **sampling) for seed in (7, 8, 9)]
    assert [answer.token_ids for answer in many] == [answer.token_ids for answer in each]
    assert len({answer.text for answer in many}) == 3


def test_64_streams_for_a_while(qwen2: Service) -> None:
    """The short form of `make soak`."""
    found = asyncio.run(
        soak(qwen2.server.grpc_url, streams=64, duration_s=10, process_id=qwen2.server.pid)
    )
    print(report(found, 64))  # noqa: T201
    assert found.answers >= 64
    assert not found.errors, found.errors
    assert not found.mismatches, found.mismatches[:3]
    names = {name.split(" ")[0] for name in found.rss}
    assert {"tensorrt_llm", "preprocessing", "postprocessing", "vision_encoder"} <= names
