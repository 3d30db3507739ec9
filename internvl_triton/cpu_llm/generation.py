"""What the CPU engine is asked and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import InvalidRequest, InvalidSampling, RequestTooLong
from internvl_triton.guides import Guide

__all__ = [
    "GENERATION_STAGES",
    "EngineLimits",
    "GenerationChunk",
    "GenerationRequest",
    "GenerationTimes",
    "validate_request",
]

GENERATION_STAGES = ("waiting", "prefill", "decode")


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One prompt. Names and defaults are those of TensorRT-LLM 0.21's tensors.

    request_id: names the request for `stop`; "" cannot be stopped and may occur many times.
    """

    request_id: str
    input_ids: NDArray[np.int32]  # [n]; ids >= vocab_size select rows of the table
    prompt_embedding_table: NDArray[np.float32] | None = None  # [num_visual_tokens, hidden]
    prompt_table_extra_ids: NDArray[np.uint64] | None = None  # [n], content hashes, 0 on text
    request_output_len: int
    end_id: int = -1  # -1: none. Not part of the answer
    stop_words: tuple[tuple[int, ...], ...] = ()  # the one that ended the answer is part of it
    # sampling, see sampler.py
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 0.0  # <= 0: unset
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    guide: Guide | None = None  # the form of the answer
    # delivery
    return_log_probs: bool = False
    return_num_output_tokens: bool = False
    return_generation_logits: bool = False
    streaming: bool = False
    is_cancelled: Callable[[], bool] = _never  # polled between steps
    timeout_s: float = 0.0  # from `submit` to the last token; 0: none


@dataclass(frozen=True)
class GenerationTimes:
    """Seconds of one request: before its first step, until its first token, until its end."""

    waiting_s: float
    prefill_s: float
    decode_s: float

    def by_stage(self) -> dict[str, float]:
        """The same by the names of GENERATION_STAGES."""
        return dict(
            zip(GENERATION_STAGES, (self.waiting_s, self.prefill_s, self.decode_s), strict=True)
        )


@dataclass(frozen=True)
class GenerationChunk:
    """One response, as TensorRT-LLM 0.21 sends it.

    Streaming: the tokens of one step; the last token of an answer that reached its length or a stop
    word arrives in the final chunk, while `end_id` and `stop` give a final chunk without tokens.
    Not streaming: one final chunk with the whole answer, or what there was of it at a `stop`.
    `times` come with the final chunk.
    `log_probs` are those of the **whole answer so far**, in streamed chunks too (0.21's
    `LlmRequest::createResult`): those of the new tokens are the last `num_output_tokens` ones.
    `generation_logits` [num_output_tokens, vocab_size] are those of the new tokens only, as the
    model gave them; None when not asked for, or without new tokens.
    """

    new_token_ids: tuple[int, ...]
    num_input_tokens: int
    log_probs: tuple[float, ...] = ()  # natural logarithms
    final: bool = False
    error: str = ""
    times: GenerationTimes | None = field(default=None, compare=False)
    generation_logits: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def num_output_tokens(self) -> int:
        """Tokens in this chunk, not in the answer so far (0.21's `fillTritonResponse`)."""
        return len(self.new_token_ids)


@dataclass(frozen=True)
class EngineLimits:
    """What one request must fit into."""

    vocab_size: int
    hidden_size: int
    max_seq_len: int
    max_visual_tokens: int


def validate_request(request: GenerationRequest, limits: EngineLimits) -> None:
    """Check everything that does not depend on other requests.

    Raises RequestTooLong, InvalidSampling or InvalidRequest, with what was given and allowed.
    """
    n = len(request.input_ids)
    if request.input_ids.ndim != 1 or n == 0:
        raise InvalidRequest(
            f"input_ids has shape {request.input_ids.shape}; give a prompt of at least one token"
        )
    if request.request_output_len < 1:
        raise InvalidRequest(f"request_output_len is {request.request_output_len}; give at least 1")
    if n + request.request_output_len > limits.max_seq_len:
        raise RequestTooLong(
            f"prompt of {n} tokens + request_output_len {request.request_output_len} = "
            f"{n + request.request_output_len} exceeds max_seq_len {limits.max_seq_len}; "
            "shorten the prompt, send fewer tiles or ask for fewer tokens"
        )
    _check_prompt_table(request, limits)
    if not -1 <= request.end_id < limits.vocab_size:
        raise InvalidRequest(
            f"end_id is {request.end_id}; allowed: -1 (none) to {limits.vocab_size - 1}"
        )
    if not all(request.stop_words):
        raise InvalidRequest("a stop word has no tokens; leave it out")
    _check_sampling(request)


def _check_prompt_table(request: GenerationRequest, limits: EngineLimits) -> None:
    ids, table, extra = (
        request.input_ids,
        request.prompt_embedding_table,
        request.prompt_table_extra_ids,
    )
    if ids.min() < 0:
        raise InvalidRequest(f"input_ids holds {ids.min()}; token ids start at 0")
    rows = 0
    if table is not None:
        if table.ndim != 2 or table.shape[1] != limits.hidden_size:
            raise InvalidRequest(
                f"prompt_embedding_table has shape {table.shape}; "
                f"expected [num_visual_tokens, {limits.hidden_size}]"
            )
        rows = len(table)
    if rows > max(limits.max_visual_tokens, 1):  # a text-only request brings one dummy row
        raise RequestTooLong(
            f"{rows} visual tokens exceed the engine's limit of {limits.max_visual_tokens} "
            "for one request; send fewer images or lower max_tiles"
        )
    largest = int(ids.max())
    if largest >= limits.vocab_size + rows:
        raise InvalidRequest(
            f"virtual token id {largest} selects row {largest - limits.vocab_size} of "
            f"prompt_embedding_table, which has {rows} rows"
        )
    if extra is not None and extra.shape != ids.shape:
        raise InvalidRequest(
            f"prompt_table_extra_ids has shape {extra.shape}, input_ids {ids.shape}; "
            "send one extra id per token"
        )


def _check_sampling(request: GenerationRequest) -> None:
    """Ranges of `SamplingConfig` (TensorRT-LLM 0.21, `executor/samplingConfig.cpp`)."""
    for name, allowed, valid in (
        ("temperature", ">= 0", request.temperature >= 0),
        ("top_k", ">= 0 (0 = all tokens)", request.top_k >= 0),
        ("top_p", "<= 1 (0 = unset)", request.top_p <= 1),
        ("seed", "0 to 2^64 - 1", 0 <= request.seed < 2**64),
        ("repetition_penalty", "> 0", request.repetition_penalty > 0),
        ("presence_penalty", "any number", True),
        ("frequency_penalty", "any number", True),
        ("min_tokens", ">= 0", request.min_tokens >= 0),
    ):
        value = getattr(request, name)
        if not math.isfinite(value) or not valid:
            raise InvalidSampling(f"{name} is {value}; allowed: {allowed}")
