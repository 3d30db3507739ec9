"""How tensor parallelism divides one weight: pure functions, one array per rank, no copies.

A linear weight is (out, in). Source: `split`, `split_qkv_tp`, `dup_kv_weight` and `pad_vocab_size`
in TensorRT-LLM 0.21 (`tensorrt_llm/models/convert_utils.py`, `models/llama/convert.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["split_columns", "split_heads", "split_rows", "split_vocabulary", "split_wqkv"]

Array = NDArray[Any]


def split_rows(weight: Array, tp_size: int) -> list[Array]:
    """Outputs divided evenly: (out, ...) -> tp_size views (out / tp_size, ...)."""
    return np.split(weight, tp_size, axis=0)


def split_columns(weight: Array, tp_size: int) -> list[Array]:
    """Inputs divided evenly: (out, in) -> tp_size views (out, in / tp_size).

    Each rank then computes a partial sum of the whole output; NVIDIA adds them by an all-reduce.
    """
    return np.split(weight, tp_size, axis=1)


def split_heads(weight: Array, *, num_heads: int, tp_size: int) -> list[Array]:
    """Whole heads divided evenly: (num_heads * head_dim, ...) -> tp_size views.

    With fewer heads than ranks, rank r gets head r // (tp_size / num_heads): consecutive ranks
    share one, which is how the ranks' query heads need it.
    """
    if num_heads >= tp_size:
        return np.split(weight, tp_size, axis=0)
    heads = np.split(weight, num_heads, axis=0)
    return [heads[rank * num_heads // tp_size] for rank in range(tp_size)]


def split_vocabulary(weight: Array, tp_size: int) -> list[Array]:
    """(vocab_size, hidden) -> tp_size views of ceil(vocab_size / tp_size) rows.

    The last ones may be shorter, even empty: the missing rows are TensorRT-LLM's zero padding.
    """
    rows = -(-len(weight) // tp_size)
    return [weight[rank * rows : (rank + 1) * rows] for rank in range(tp_size)]


def split_wqkv(
    wqkv: Array, *, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Array, Array, Array]:
    """InternLM2's fused weight -> q, k, v with their heads in order.

    Its rows are grouped by kv head: that group's query heads, then one k and one v head.
    Returns (num_heads * head_dim, hidden) and twice (num_kv_heads * head_dim, hidden).
    """
    groups = num_heads // num_kv_heads
    grouped = wqkv.reshape(num_kv_heads, groups + 2, head_dim, wqkv.shape[1])
    q, k, v = grouped[:, :groups], grouped[:, groups], grouped[:, groups + 1]
    return tuple(part.reshape(-1, wqkv.shape[1]) for part in (q, k, v))  # type: ignore[return-value]
