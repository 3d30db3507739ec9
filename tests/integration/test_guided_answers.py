"""Guides and alternatives of tokens, through the whole service."""

from __future__ import annotations

import json
import math
import re

import pytest

from internvl_triton.errors import InvalidRequest
from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture

pytestmark = pytest.mark.triton

IMAGE = encoded(picture(300, 300, 7))
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [1, 2])
def test_guided_answers(service: Service, seed: int) -> None:
    sampled = {"temperature": 1.5, "top_p": 1.0, "seed": seed, "images": [IMAGE]}
    chosen = service.client.generate(
        "Which?", guided_choice=["yes", "no.", "it (de)pends"], **sampled
    )
    assert chosen.text in ("yes", "no.", "it (de)pends")
    assert chosen.finish_reason == "stop"
    matched = "".join(
        chunk.text
        for chunk in service.client.stream("?", guided_regex="[0-9]{2}-[a-f]{3}", **sampled)
    )
    assert re.fullmatch("[0-9]{2}-[a-f]{3}", matched)
    answer = service.client.generate("How many?", guided_json=SCHEMA, max_tokens=200, **sampled)
    assert 0 <= json.loads(answer.text)["count"] <= 99


def test_a_bad_guide_is_refused_with_its_fault(qwen2: Service) -> None:
    with pytest.raises(InvalidRequest, match=r"guided_regex cannot be enforced: .*unclosed group"):
        qwen2.client.generate("?", guided_regex="(a")
    with pytest.raises(
        InvalidRequest, match=r"guided_json cannot be enforced: Invalid type: thing"
    ):
        qwen2.client.generate("?", guided_json={"type": "thing"})


@pytest.mark.parametrize("stream", [True, False])
def test_alternatives_of_each_token(service: Service, stream: bool) -> None:
    asked = {"max_tokens": 6, "min_tokens": 6, "logprobs": True, "top_logprobs": 5}
    if stream:
        chunks = list(service.client.stream("Hello", **asked))
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        log_probs = [value for chunk in chunks for value in chunk.log_probs]
        alternatives = [top for chunk in chunks for top in chunk.top_log_probs]
    else:
        answer = service.client.generate("Hello", **asked)
        tokens, log_probs = answer.token_ids, answer.log_probs
        alternatives = answer.top_log_probs
    assert len(tokens) == len(alternatives) == 6
    for token, log_prob, top in zip(tokens, log_probs, alternatives, strict=True):
        assert len(top) == 5
        best = list(top)
        assert token in (best[0], best[1])  # the second, where min_tokens forbids the end
        if token == best[0]:
            assert top[token] == pytest.approx(log_prob, abs=0.01)  # min_tokens takes the end away
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert sum(math.exp(value) for value in top.values()) <= 1 + 1e-6


def test_no_alternatives_unless_asked_for(qwen2: Service) -> None:
    answer = qwen2.client.generate("Hello", max_tokens=3, min_tokens=3, logprobs=True)
    assert len(answer.log_probs) == 3
    assert not any(answer.top_log_probs)
    with pytest.raises(InvalidRequest, match="top_logprobs is 3; it must be 0 without logprobs"):
        qwen2.client.generate("Hello", top_logprobs=3)
