"""The second turn of a dialogue computes only what is new, and answers as if it had not."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.prometheus import Samples, read_samples
from internvl_triton.client import Answer
from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture
from tests.integration.processes import eventually

pytestmark = pytest.mark.triton

IMAGES = [encoded(picture(300 + seed, 300, 100 + seed)) for seed in range(3)]  # one tile each


def user(text: str, num_images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def counted(service: Service, requests: float) -> Samples:
    """All metrics, once the language model has counted that many requests."""

    def complete() -> bool:
        finished = read_samples(service.server.metrics_url).sum("internvl_requests_finished_total")
        return finished >= requests

    assert eventually(complete)
    return read_samples(service.server.metrics_url)


class Turns:
    """Asks, and tells what the service computed for it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.before = read_samples(service.server.metrics_url)

    def ask(self, messages: list[dict[str, Any]], images: list[bytes]) -> tuple[Answer, Samples]:
        answer = self.service.client.generate(messages, images=images, max_tokens=12, min_tokens=12)
        done = self.before.sum("internvl_requests_finished_total") + 1
        after = counted(self.service, done)
        added, self.before = after.since(self.before), after
        return answer, added


def test_a_second_turn_runs_no_vit_and_reuses_the_prefix(qwen2: Service) -> None:
    turns = Turns(qwen2)
    first = [user("What is this?", 1)]
    answer, added = turns.ask(first, IMAGES[:1])
    assert added.sum("internvl_feature_cache_misses_total", model="vision_encoder") == 1
    assert added.sum("internvl_vision_tiles_total") == 1
    assert added.sum("internvl_prompt_tokens_total", model="tensorrt_llm") > 256
    assert added.sum("internvl_generated_tokens_total") == 12
    prompt_tokens = answer.num_input_tokens

    second = [*first, assistant(answer.text or "-"), user("And what else?")]
    answer, added = turns.ask(second, IMAGES[:1])
    assert added.sum("internvl_feature_cache_hits_total", model="vision_encoder") == 1
    assert added.sum("internvl_feature_cache_misses_total") == 0
    assert added.sum("internvl_vision_tiles_total") == 0
    reused = added.sum("internvl_reused_tokens_total", model="tensorrt_llm")
    assert prompt_tokens - 32 <= reused < answer.num_input_tokens
    assert added.sum("internvl_prompt_tokens_total") == answer.num_input_tokens - reused

    # with another image in the same place nothing behind the system message is the same
    _, added = turns.ask(first, IMAGES[1:2])
    assert added.sum("internvl_feature_cache_misses_total") == 1
    assert added.sum("internvl_reused_tokens_total") < 256


def test_one_new_image_among_old_ones_is_the_only_one_encoded(qwen2: Service) -> None:
    turns = Turns(qwen2)
    other = [encoded(picture(310 + seed, 310, 200 + seed)) for seed in range(3)]
    turns.ask([user("Compare.", 2)], other[:2])
    _, added = turns.ask([user("Compare.", 3)], [other[0], other[2], other[1]])
    assert added.sum("internvl_feature_cache_hits_total") == 2
    assert added.sum("internvl_feature_cache_misses_total") == 1
    assert added.sum("internvl_vision_tiles_total") == 1


def test_an_answer_is_the_same_from_the_caches(qwen2: Service) -> None:
    """A dialogue asked turn by turn, and its last turn asked again when everything is cached."""
    turns = Turns(qwen2)
    images = [encoded(picture(320, 320, 300))]
    messages = [user("Describe it.", 1)]
    first, _ = turns.ask(messages, images)
    again, added = turns.ask(messages, images)
    assert added.sum("internvl_reused_tokens_total") > 256
    assert again.token_ids == first.token_ids
    assert again.text == first.text
