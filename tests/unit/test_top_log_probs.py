"""Alternatives of each token against a sort of the whole vocabulary."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_triton.errors import InvalidSampling
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tokenizer import Tokenizer
from internvl_triton.top_log_probs import MAX_TOP_LOG_PROBS, top_log_probs


def test_by_hand() -> None:
    logits = np.array([[0.0, math.log(2), math.log(5), 100.0]], np.float32)  # the last is padding
    ids, values = top_log_probs(logits, 3)
    assert ids.tolist() == [[2, 1, 0]]  # probabilities 5/8, 2/8, 1/8
    assert values[0] == pytest.approx([math.log(5 / 8), math.log(2 / 8), math.log(1 / 8)])


def test_like_a_sort_of_everything() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (7, 1000)).astype(np.float32)
    logits[3] = np.round(logits[3])  # ties
    logits[4, 50:] = -np.inf
    ids, values = top_log_probs(logits, 990)
    for row, one in enumerate(logits[:, :990].tolist()):
        order = sorted(range(990), key=lambda token: (-one[token], token))[:MAX_TOP_LOG_PROBS]
        assert ids[row].tolist() == order
        norm = math.log(sum(math.exp(value) for value in one))
        assert values[row] == pytest.approx([one[token] - norm for token in order], abs=1e-4)


def test_what_cannot_occur_is_still_a_number() -> None:
    logits = np.full((1, 30), -np.inf, np.float32)
    logits[0, 7] = 3
    ids, values = top_log_probs(logits, 30)
    assert ids[0, 0] == 7
    assert values[0].tolist() == [0.0, *[-9999.0] * 19]


def test_no_tokens() -> None:
    ids, values = top_log_probs(np.zeros((0, 50), np.float32), 50)
    assert ids.shape == values.shape == (0, 20)


def test_an_answer_whose_logits_would_be_too_many_is_refused(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    spec = ModelSpec.from_checkpoint(checkpoint)
    limits = Limits.for_model(spec, max_logits_bytes=4 * spec.llm.vocab_size * 100)
    preprocess = Preprocessor(spec, limits, tokenizer)

    def max_tokens(**sampling: Any) -> int:
        asked = Request(text_input="Hi", sampling_parameters=json.dumps(sampling))
        return int(preprocess(asked)["request_output_len"].item())

    assert max_tokens() > 100
    assert max_tokens(logprobs=True) > 100
    assert max_tokens(logprobs=True, top_logprobs=1) == 100
    assert max_tokens(logprobs=True, top_logprobs=1, max_tokens=100) == 100
    with pytest.raises(InvalidSampling, match=r"max_tokens is 101; with top_logprobs .* most 100"):
        max_tokens(logprobs=True, top_logprobs=1, max_tokens=101)
