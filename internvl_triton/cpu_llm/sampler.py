"""The next token, as TensorRT-LLM 0.21 chooses it.

Penalties: `cpp/tensorrt_llm/kernels/penaltyKernels.cu`. Top-k: `samplingTopKKernels.cu`. Top-p:
`samplingTopPKernels.cu`. Both draw u in (0, 1] and take the first token, most likely first, whose
cumulative probability reaches u * top_p: inside the nucleus the last token keeps only the part of
its probability below top_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_triton.cpu_llm.generation import GenerationRequest
from internvl_triton.errors import EngineError
from internvl_triton.guides import GuideMatcher

__all__ = ["Sampler", "choose", "log_prob", "penalise"]

Array = NDArray[np.float32]

MAX_TOP_K = 1024  # 0.21's TOP_K_MAX; larger values are clipped to it
MASKED = np.finfo(np.float32).min


class Sampler:
    """Sampling state of one request: occurrences of tokens, answer length, random generator."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        vocab_size: int,
        matcher: GuideMatcher | None = None,
    ) -> None:
        self._request = request
        self._matcher = matcher
        self._num_generated = 0
        self._random = np.random.Generator(np.random.PCG64(request.seed))
        self._occurrences: NDArray[np.int64] | None = None
        if (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        ):
            ids = request.input_ids
            self._occurrences = np.bincount(ids[ids < vocab_size], minlength=vocab_size)

    def __call__(self, logits: Array) -> tuple[int, float]:
        """logits (vocab_size,) -> the token and the log-prob of it.

        Raises EngineError when the logits are not numbers.
        """
        request = self._request
        if self._matcher is not None:
            logits = np.where(self._matcher.allowed(), logits, np.float32(-np.inf))
        masked = request.end_id if self._num_generated < request.min_tokens else -1
        penalised = penalise(
            logits,
            self._occurrences,
            temperature=request.temperature,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            masked_id=masked,
        )
        uniform = 1.0 - self._random.random()  # (0, 1], as curand_uniform
        token = choose(penalised, top_k=request.top_k, top_p=request.top_p, uniform=uniform)
        self._num_generated += 1
        if self._matcher is not None and token != request.end_id:
            self._matcher.accept(token)
        if self._occurrences is not None:
            self._occurrences[token] += 1
        return token, log_prob(penalised, token) if request.return_log_probs else 0.0


def penalise(
    logits: Array,
    occurrences: NDArray[np.int64] | None,
    *,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    masked_id: int = -1,
) -> Array:
    """Temperature, then the penalties of tokens that occurred in prompt or answer, then the mask.

    occurrences: int (vocab_size,) or None for no penalties. masked_id: never chosen; -1 = none.
    """
    penalised: Array = logits.astype(np.float32)
    if temperature != 1.0:
        penalised *= np.float32(1 / (temperature + 1e-6))
    if occurrences is not None:
        occurred = np.flatnonzero(occurrences)
        values = penalised[occurred]
        repetition = np.float32(repetition_penalty)
        values = np.where(values < 0, values * repetition, values / repetition)
        values -= np.float32(presence_penalty)
        values -= np.float32(frequency_penalty) * occurrences[occurred].astype(np.float32)
        penalised[occurred] = values
    if masked_id >= 0:
        penalised[masked_id] = MASKED
    return penalised


def choose(logits: Array, *, top_k: int, top_p: float, uniform: float) -> int:
    """The token for one draw, `uniform` in (0, 1]. Ties are ordered by id, lowest first.

    top_k 1, or top_k 0 with top_p unset (<= 0), is greedy. With top_k, probabilities are
    normalised among the k best before top_p applies. Raises EngineError for NaN logits.
    """
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise EngineError(f"the model produced the logit {logits[best]}")
    if top_k == 1 or (top_k == 0 and top_p <= 0):
        return best
    k = min(top_k, MAX_TOP_K, len(logits)) or len(logits)
    order = _most_likely(logits, k)
    cumulative = np.cumsum(np.exp((logits[order] - logits[best]).astype(np.float64)))
    limit = uniform * (top_p if top_p > 0 else 1.0) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, limit)), k - 1)])


def log_prob(logits: Array, token: int) -> float:
    """ln softmax(logits)[token], of the penalised logits.

    This is 0.21 with normalize_log_probs false; true, its default, divides by the sum of the top k
    and so gives 0 for every greedy token.
    """
    shifted = (logits - logits.max()).astype(np.float64)
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def _most_likely(logits: Array, k: int) -> NDArray[np.int64]:
    """Ids of the k largest logits, largest first, ties by id."""
    candidates: Sequence[int] | NDArray[np.int64] = np.arange(len(logits))
    if k < len(logits):
        kth = np.partition(logits, -k)[-k]
        candidates = np.flatnonzero(logits >= kth)
    order: NDArray[np.int64] = np.asarray(candidates)[
        np.argsort(-logits[candidates], kind="stable")
    ]
    return order[:k]
