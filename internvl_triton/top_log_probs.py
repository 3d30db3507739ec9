"""The most likely tokens of each step of an answer, from the model's logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_TOP_LOG_PROBS", "top_log_probs"]

MAX_TOP_LOG_PROBS = 20  # OpenAI's limit of `top_logprobs`
_IMPOSSIBLE = np.float32(-9999.0)  # OpenAI's value for what cannot occur: JSON has no infinity


def top_log_probs(
    logits: NDArray[np.float32], vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """logits (n, vocab_size or more: padding at the end) -> ids and ln softmax, both (n, 20).

    Most likely first, ties by id; fewer columns than 20 if the vocabulary is smaller.
    """
    logits = logits[:, :vocab_size]
    count = min(MAX_TOP_LOG_PROBS, vocab_size)
    ids = np.empty((len(logits), count), np.int32)
    values = np.empty((len(logits), count), np.float32)
    for row, one in enumerate(logits):
        kth = np.partition(one, -count)[-count]
        candidates = np.flatnonzero(one >= kth)
        best = candidates[np.argsort(-one[candidates], kind="stable")][:count]
        shifted = (one - one[best[0]]).astype(np.float64)
        ids[row] = best
        values[row] = shifted[best] - np.log(np.exp(shifted).sum())
    return ids, np.maximum(values, _IMPOSSIBLE)
