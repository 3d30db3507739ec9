"""Keys and values of one sequence on one rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["KvCache"]

Array = NDArray[np.float32]


class KvCache:
    """float32 keys and values of `num_kv_heads` heads in every layer, grown by doubling.

    `length` is the number of positions whose keys and values are complete in all layers.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int = 64
    ) -> None:
        self.length = 0
        self._store = np.empty((num_layers, 2, num_kv_heads, capacity, head_dim), np.float32)

    @property
    def capacity(self) -> int:
        return int(self._store.shape[3])

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in all."""
        if length <= self.capacity:
            return
        shape = list(self._store.shape)
        shape[3] = max(length, 2 * self.capacity)
        grown = np.empty(shape, np.float32)
        grown[:, :, :, : self.length] = self._store[:, :, :, : self.length]
        self._store = grown

    def append(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        """Store one layer's keys and values, (n, num_kv_heads, head_dim), behind `length`.

        Returns views of all keys and values up to there: (num_kv_heads, length + n, head_dim).
        Call `reserve` before and `advance` after all layers are done.
        """
        end = self.length + len(keys)
        self._store[layer, 0, :, self.length : end] = keys.transpose(1, 0, 2)
        self._store[layer, 1, :, self.length : end] = values.transpose(1, 0, 2)
        return self._store[layer, 0, :, :end], self._store[layer, 1, :, :end]

    def advance(self, positions: int) -> None:
        self.length += positions

    def copy(self, start: int, end: int) -> Array:
        """Complete positions, (num_layers, 2, num_kv_heads, end - start, head_dim)."""
        assert end <= self.length, (end, self.length)
        return self._store[:, :, :, start:end].copy()

    def extend(self, positions: Array) -> None:
        """Append complete positions, as `copy` gives them. Call `reserve` before."""
        end = self.length + positions.shape[3]
        self._store[:, :, :, self.length : end] = positions
        self.length = end
