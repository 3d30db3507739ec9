"""Rotary embedding and causal attention of one sequence, in numpy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["RotaryEmbedding", "causal_attention"]

Array = NDArray[np.float32]

MAX_SCORES = 4 * 2**20  # attention scores in memory at once: 16 MB of float32
ROWS = 64  # queries of a block: its scores stay in the cache, and few of them are hidden
# Up to so many rows, BLAS is faster with one product of the matrix and a vector for each: for a
# product of matrices it first copies the keys.
FEW_ROWS = 4


class RotaryEmbedding:
    """RoPE with rotated halves ("rope_gpt_neox"): pairs are (i, i + head_dim / 2).

    angle(position, i) = position / theta^(2 i / head_dim), with the float32 roundings of the
    reference (`LlamaRotaryEmbedding`): the last bit of a frequency, times thousands of positions,
    is visible in the logits. Only the power is taken in float64, for the same bits everywhere.
    """

    def __init__(self, *, head_dim: int, theta: float, max_positions: int) -> None:
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        wavelengths = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1) / wavelengths
        angles = np.outer(np.arange(max_positions, dtype=np.float32), frequencies)
        self._cos, self._sin = np.cos(angles), np.sin(angles)

    def rotate(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """x (n, heads, head_dim) at `positions` (n,)."""
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        half = x.shape[2] // 2
        first, second = x[:, :, :half], x[:, :, half:]
        rotated = np.empty_like(x)
        rotated[:, :, :half] = first * cos - second * sin
        rotated[:, :, half:] = second * cos + first * sin
        return rotated


def causal_attention(queries: Array, keys: Array, values: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v for the last n of `length` positions.

    queries (n, heads, head_dim); keys and values (kv_heads, length, head_dim); head h reads kv
    head h // (heads / kv_heads). Returns (n, heads * head_dim). Queries are taken in blocks, and
    keys behind a block's last query are never multiplied, so memory does not grow with n.
    """
    n, heads, head_dim = queries.shape
    kv_heads, length, _ = keys.shape
    groups, past = heads // kv_heads, length - n
    grouped = queries.reshape(n, kv_heads, groups, head_dim).transpose(1, 0, 2, 3)
    grouped = grouped * np.float32(1 / math.sqrt(head_dim))
    output = np.empty((n, kv_heads, groups, head_dim), np.float32)
    step = max(1, min(n, ROWS, MAX_SCORES // (heads * length)))
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows, visible = stop - start, past + stop
        block = grouped[:, start:stop].reshape(kv_heads, rows * groups, head_dim)
        scores = _product(block, keys[:, :visible].transpose(0, 2, 1))
        if rows > 1:
            by_row = scores.reshape(kv_heads, rows, groups, visible)
            hidden = np.triu(np.ones((rows, rows), dtype=bool), 1)[:, None]
            np.copyto(by_row[..., past + start :], np.float32(-np.inf), where=hidden)
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        attended = _product(scores, values[:, :visible])
        attended /= scores.sum(axis=2, keepdims=True)
        attended = attended.reshape(kv_heads, rows, groups, head_dim)
        output[start:stop] = attended.transpose(1, 0, 2, 3)
    return output.reshape(n, heads * head_dim)


def _product(rows: Array, matrix: Array) -> Array:
    """rows (kv_heads, m, k) times matrix (kv_heads, k, n): (kv_heads, m, n)."""
    m = rows.shape[1]
    if m > FEW_ROWS:
        return rows @ matrix
    product = np.empty((len(rows), m, matrix.shape[2]), np.float32)
    for row in range(m):
        np.matmul(rows[:, row : row + 1], matrix, out=product[:, row : row + 1])
    return product
