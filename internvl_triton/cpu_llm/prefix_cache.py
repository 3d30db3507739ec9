"""Keys and values of past prompts, so that the next turn of a dialogue computes only its end.

As TensorRT-LLM's KV cache reuse: whole blocks of tokens, each known by its own token ids and extra
ids and by all blocks before it. Virtual token ids are the same in every request; the extra id, a
hash of the image, tells whose they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_triton.cpu_llm.kv_cache import KvCache

__all__ = ["TOKENS_PER_BLOCK", "PrefixCache"]

TOKENS_PER_BLOCK = 32  # trtllm-build's --tokens_per_block

# A block's key is the serial number of the block before it (0: none) and its own ids, compared in
# full. A serial number is never given twice, so it stands for everything before, without hashes
# that could collide.
_Key = tuple[int, bytes]


@dataclass(frozen=True)
class _Block:
    serial: int
    parts: list[NDArray[np.float32]]  # per rank: (layers, 2, kv_heads, TOKENS_PER_BLOCK, head_dim)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class PrefixCache:
    """Least recently used blocks, together never more than `max_bytes`; 0 stores nothing.

    Not thread-safe: the scheduler's thread owns it. A block is never older than the blocks behind
    it, so eviction takes the ends of prefixes before their beginnings.
    """

    def __init__(self, max_bytes: int, *, vocab_size: int) -> None:
        assert max_bytes >= 0, max_bytes
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._vocab_size = vocab_size
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._last_serial = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def take(
        self,
        ids: NDArray[np.int32],
        extra_ids: NDArray[np.uint64] | None,
        caches: Sequence[KvCache],
    ) -> int:
        """Fill the empty `caches`, one per rank, with the longest known prefix of a prompt.

        ids, extra_ids: [n]. Returns its length in tokens, always less than n: the model has to see
        at least the last token to say what follows.
        """
        found: list[tuple[_Key, _Block]] = []
        serial = 0
        for content in self._contents(ids[:-1], extra_ids):
            block = self._blocks.get((serial, content))
            if block is None:
                break
            found.append(((serial, content), block))
            serial = block.serial
        self._touch([key for key, _ in found])
        length = len(found) * TOKENS_PER_BLOCK
        for rank, cache in enumerate(caches):
            cache.reserve(length)
            for _, block in found:
                cache.extend(block.parts[rank])
        return length

    def store(
        self,
        ids: NDArray[np.int32],
        extra_ids: NDArray[np.uint64] | None,
        caches: Sequence[KvCache],
    ) -> None:
        """Keep the whole blocks of `ids` [n], whose keys and values are the first n of `caches`.

        extra_ids: [n] or None. What does not fit into the budget is left out, from the end.
        """
        keys: list[_Key] = []
        serial = 0
        known = True
        for number, content in enumerate(self._contents(ids, extra_ids)):
            key = (serial, content)
            block = self._blocks.get(key) if known else None
            if block is None:
                if known:
                    self._touch(keys)  # the chain so far, and what joins it, is evicted last
                    known = False
                block = self._new_block(number, caches)
                if not self._make_room(block.nbytes, spare=len(keys)):
                    break
                self._blocks[key] = block
                self.num_bytes += block.nbytes
            keys.append(key)
            serial = block.serial
        self._touch(keys)

    def _contents(
        self, ids: NDArray[np.int32], extra_ids: NDArray[np.uint64] | None
    ) -> Iterator[bytes]:
        """The ids of each whole block, up to the first image that has no extra id."""
        extras = np.zeros(len(ids), np.uint64) if extra_ids is None else extra_ids[: len(ids)]
        assert ids.dtype == np.int32, ids.dtype
        assert extras.dtype == np.uint64, extras.dtype
        anonymous = np.flatnonzero((ids >= self._vocab_size) & (extras == 0))
        length = int(anonymous[0]) if len(anonymous) else len(ids)
        for start in range(0, length - TOKENS_PER_BLOCK + 1, TOKENS_PER_BLOCK):
            end = start + TOKENS_PER_BLOCK
            yield ids[start:end].tobytes() + extras[start:end].tobytes()

    def _new_block(self, number: int, caches: Sequence[KvCache]) -> _Block:
        self._last_serial += 1
        start = number * TOKENS_PER_BLOCK
        parts = [cache.copy(start, start + TOKENS_PER_BLOCK) for cache in caches]
        return _Block(self._last_serial, parts)

    def _make_room(self, nbytes: int, *, spare: int) -> bool:
        """Evict until `nbytes` fit, but not the `spare` blocks used last; whether they fit now."""
        while self.num_bytes + nbytes > self.max_bytes:
            if len(self._blocks) <= spare:
                return False
            _, evicted = self._blocks.popitem(last=False)
            self.num_bytes -= evicted.nbytes
        return True

    def _touch(self, keys: Sequence[_Key]) -> None:
        """Make a chain the most recently used, its first block the very last to be evicted."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
