"""The decoder of both families, executed as its tensor-parallel ranks would, in float32.

Each rank multiplies by its own weight shards and keeps the keys and values of its own kv heads.
Quantised weights stay quantised in memory; activations are float32.
The ranks meet where NVIDIA's do: partial sums of `attention.dense` and `mlp.proj` are added (an
all-reduce), vocabulary shards of the logits are concatenated (an all-gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_triton.cpu_llm.attention import RotaryEmbedding, causal_attention
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.rank_layout import kv_heads_per_rank
from internvl_triton.cpu_llm.rank_weights import LayerWeights, RankWeights, load_ranks
from internvl_triton.cpu_llm.weight_only import linear
from internvl_triton.errors import EngineError
from internvl_triton.model_spec import LLMSpec

__all__ = ["Segment", "Transformer"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Segment:
    """The next tokens of one sequence: a piece of its prompt, or the token sampled last."""

    token_ids: NDArray[np.int32]  # [n]
    caches: list[KvCache]  # one per rank, from `Transformer.new_caches`
    prompt_embedding_table: Array | None = None  # [num_visual_tokens, hidden]


class Transformer:
    def __init__(self, spec: LLMSpec, ranks: Sequence[RankWeights], *, max_seq_len: int) -> None:
        self.spec = spec
        self.ranks = list(ranks)
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        self._heads = spec.num_heads // len(ranks)
        self._kv_heads = kv_heads_per_rank(spec, len(ranks))
        self._rotary = RotaryEmbedding(
            head_dim=spec.head_dim, theta=spec.rope_theta, max_positions=max_seq_len
        )

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path, *, max_seq_len: int) -> Transformer:
        """Load a TensorRT-LLM checkpoint. Raises ArtifactMismatch."""
        spec, ranks = load_ranks(checkpoint_dir)
        return cls(spec, ranks, max_seq_len=max_seq_len)

    def new_caches(self) -> list[KvCache]:
        """Empty caches of one sequence, one per rank."""
        return [
            KvCache(
                num_layers=self.spec.num_layers,
                num_kv_heads=self._kv_heads,
                head_dim=self.spec.head_dim,
            )
            for _ in self.ranks
        ]

    def forward(self, segments: Sequence[Segment]) -> Array:
        """Hidden states behind the last layer, (sum of n, hidden), segment after segment.

        All projections multiply the rows of all segments at once; attention runs per sequence.
        Appends to the segments' caches. Raises EngineError for a virtual id beyond the table.
        """
        lengths = [len(segment.token_ids) for segment in segments]
        starts = np.cumsum([0, *lengths])
        slices = [slice(a, b) for a, b in pairwise(starts)]
        positions = np.concatenate(
            [
                np.arange(segment.caches[0].length, segment.caches[0].length + n)
                for segment, n in zip(segments, lengths, strict=True)
            ]
        )
        for segment, n in zip(segments, lengths, strict=True):
            for cache in segment.caches:
                cache.reserve(cache.length + n)
        x = np.concatenate([self._embed(segment) for segment in segments])
        eps = self.spec.norm_eps
        for index in range(self.spec.num_layers):
            layers = [rank.layers[index] for rank in self.ranks]
            normed = _rms_norm(x, layers[0].input_layernorm, eps)
            for rank, layer in enumerate(layers):
                caches = [segment.caches[rank] for segment in segments]
                x = x + self._attention(layer, index, normed, positions, slices, caches)
            normed = _rms_norm(x, layers[0].post_layernorm, eps)
            for layer in layers:
                x = x + _mlp(layer, normed)
        for segment, n in zip(segments, lengths, strict=True):
            for cache in segment.caches:
                cache.advance(n)
        return x

    def logits(self, hidden: Array) -> Array:
        """Rows of `forward` (n, hidden) -> (n, vocab_size), the vocabulary's padding cut off."""
        normed = _rms_norm(hidden, self.ranks[0].ln_f, self.spec.norm_eps)
        shards = [normed @ rank.lm_head.T for rank in self.ranks]
        padded: Array = np.concatenate(shards, axis=1)
        return padded[:, : self.vocab_size]

    def _embed(self, segment: Segment) -> Array:
        """Ids below vocab_size are tokens; the others select rows of the prompt table."""
        ids = segment.token_ids
        is_token = ids < self.vocab_size
        embedded = np.empty((len(ids), self.hidden_size), np.float32)
        embedded[is_token] = self.ranks[0].vocab_embedding[ids[is_token]]
        rows = ids[~is_token] - self.vocab_size
        if len(rows):
            table = segment.prompt_embedding_table
            available = 0 if table is None else len(table)
            if rows.max() >= available:
                raise EngineError(
                    f"virtual token id {rows.max() + self.vocab_size} selects row {rows.max()} of "
                    f"prompt_embedding_table, which has {available} rows"
                )
            assert table is not None
            embedded[~is_token] = table[rows]
        return embedded

    def _attention(
        self,
        layer: LayerWeights,
        index: int,
        normed: Array,
        positions: NDArray[np.int64],
        slices: Sequence[slice],
        caches: Sequence[KvCache],
    ) -> Array:
        """One rank's partial sum of `attention.dense`: (rows, hidden)."""
        qkv = linear(normed, layer.qkv)
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        heads = qkv.reshape(len(qkv), -1, self.spec.head_dim)
        rotated = self._rotary.rotate(heads[:, : self._heads + self._kv_heads], positions)
        queries, keys = rotated[:, : self._heads], rotated[:, self._heads :]
        values = heads[:, self._heads + self._kv_heads :]
        attended = np.concatenate(
            [
                causal_attention(queries[rows], *cache.append(index, keys[rows], values[rows]))
                for rows, cache in zip(slices, caches, strict=True)
            ]
        )
        return linear(attended, layer.dense)


def _mlp(layer: LayerWeights, normed: Array) -> Array:
    """One rank's partial sum of `mlp.proj`: silu(x fc^T) * (x gate^T), then proj. (rows, hidden)"""
    gated = linear(normed, layer.fc)
    with np.errstate(over="ignore"):  # exp(-x) = inf for very negative x is the right 0
        gated /= 1 + np.exp(-gated)
    gated *= linear(normed, layer.gate)
    return linear(gated, layer.proj)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    scale = np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + np.float32(eps))
    normed: Array = x / scale * weight
    return normed
