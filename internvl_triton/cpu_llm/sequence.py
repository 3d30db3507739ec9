"""One request in flight: how far its prompt and answer are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_triton.cpu_llm.generation import (
    GenerationChunk,
    GenerationRequest,
    GenerationTimes,
)
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.prefix_cache import PrefixCache
from internvl_triton.cpu_llm.sampler import Sampler
from internvl_triton.cpu_llm.transformer import Segment
from internvl_triton.guides import GuideMatcher

__all__ = ["OnChunk", "Sequence"]

OnChunk = Callable[[GenerationChunk], None]


@dataclass(eq=False)
class Sequence:
    """State that lives as long as its request. No threads here: the scheduler owns it."""

    request: GenerationRequest
    on_chunk: OnChunk
    stop_requested: bool = False  # the only field that other threads set
    matcher: GuideMatcher | None = None  # of the request's guide

    def __post_init__(self) -> None:
        self.answer: list[int] = []
        self.log_probs: list[float] = []
        self._unsent_logits: list[NDArray[np.float32]] = []
        self._submitted_s = time.perf_counter()
        self._started_s: float | None = None
        self._first_token_s: float | None = None
        self._num_sent = 0
        self._num_fed = 0  # prompt tokens given to the model, or found in the prefix cache
        self._caches: list[KvCache] = []
        self._sampler: Sampler | None = None
        longest = max(map(len, self.request.stop_words), default=0)
        # 0.21 compares stop words with prompt and answer together (stopCriteriaKernels.cu)
        ids = self.request.input_ids
        self._context: list[int] = ids[len(ids) - min(longest, len(ids)) :].tolist()

    @property
    def started(self) -> bool:
        return self._sampler is not None

    @property
    def wants_logits(self) -> bool:
        """Whether the tokens fed last end in the position of the next answer token."""
        return self._num_fed == len(self.request.input_ids)

    @property
    def is_late(self) -> bool:
        waited_s = time.perf_counter() - self._submitted_s
        return 0 < self.request.timeout_s < waited_s

    def start(self, caches: list[KvCache], *, num_reused: int, vocab_size: int) -> None:
        """caches: hold the keys and values of the first num_reused tokens of the prompt."""
        self._started_s = time.perf_counter()
        self._caches = caches
        self._num_fed = num_reused
        self._sampler = Sampler(self.request, vocab_size=vocab_size, matcher=self.matcher)

    def store_in(self, prefixes: PrefixCache) -> None:
        """Keep what the model has computed of prompt and answer so far, between two steps."""
        if not self._num_fed:
            return
        # The last token of an answer has not been fed; only its successor would need that.
        fed_answer = np.array(self.answer[:-1], np.int32)
        ids = np.concatenate([self.request.input_ids[: self._num_fed], fed_answer])
        extra_ids = self.request.prompt_table_extra_ids
        if extra_ids is not None:
            extra_ids = np.concatenate(
                [extra_ids[: self._num_fed], np.zeros(len(fed_answer), np.uint64)]
            )
        prefixes.store(ids, extra_ids, self._caches)

    def feed(self, max_prompt_tokens: int) -> Segment | None:
        """The next piece of the prompt, or the last token of the answer; None without budget."""
        if self.answer:
            return Segment(np.array(self.answer[-1:], np.int32), self._caches)
        piece = self.request.input_ids[self._num_fed : self._num_fed + max_prompt_tokens]
        if not len(piece):
            return None
        self._num_fed += len(piece)
        return Segment(piece, self._caches, self.request.prompt_embedding_table)

    def accept(self, logits: NDArray[np.float32]) -> bool:
        """Sample the next token; whether the answer is complete. Raises EngineError."""
        assert self._sampler is not None
        token, log_prob = self._sampler(logits)
        self._first_token_s = self._first_token_s or time.perf_counter()
        if token == self.request.end_id:
            return True
        self.answer.append(token)
        self._context.append(token)
        if self.request.return_log_probs:
            self.log_probs.append(log_prob)
        if self.request.return_generation_logits:
            self._unsent_logits.append(logits.copy())  # not the rows of the whole batch
        if self.matcher is not None and self.matcher.is_complete:
            return True
        return len(self.answer) == self.request.request_output_len or any(
            tuple(self._context[-len(word) :]) == word for word in self.request.stop_words
        )

    def next_chunk(self, *, final: bool, error: str = "") -> GenerationChunk:
        """What has not been sent yet. A failed request's chunk has no tokens."""
        tokens = () if error else tuple(self.answer[self._num_sent :])
        self._num_sent = len(self.answer)
        logits, self._unsent_logits = self._unsent_logits, []
        return GenerationChunk(
            new_token_ids=tokens,
            num_input_tokens=len(self.request.input_ids),
            log_probs=() if error else tuple(self.log_probs),
            final=final,
            error=error,
            times=self._times() if final else None,
            generation_logits=np.stack(logits) if tokens and logits else None,
        )

    def _times(self) -> GenerationTimes:
        ended_s = time.perf_counter()
        started_s = self._started_s or ended_s
        first_token_s = self._first_token_s or ended_s
        return GenerationTimes(
            waiting_s=started_s - self._submitted_s,
            prefill_s=first_token_s - started_s,
            decode_s=ended_s - first_token_s,
        )
