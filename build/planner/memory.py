"""Bytes on one GPU: the first one, which also holds what exists once.

Weights, tables and the KV cache are exact; activations follow from the shapes, as if nothing were
fused; the constants below are assumptions, on the safe side, not measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from build.planner.gpus import GpuModel
from build.planner.precisions import KV_CACHES, Precision
from build.planner.weights import (
    BYTES_16_BIT,
    kv_bytes_per_token,
    rank_weights,
    vision_weight_bytes,
)
from internvl_triton.gpu_deployment import GpuDeployment
from internvl_triton.limits import Limits
from internvl_triton.model_spec import LLMSpec, ModelSpec, VisionSpec

__all__ = ["MemoryParts", "MemoryPlan", "memory_plan"]

MIB = 2**20
WORKSPACE_BYTES = 2 * 256 * MIB  # scratch of matrix kernels, for each of the two engines
# CUDA contexts: the server or rank, and the Python process of vision_encoder.
CONTEXT_BYTES = 2 * 512 * MIB
NCCL_BYTES = 512 * MIB  # NCCL's buffers and TensorRT-LLM's all-reduce workspace, for TP > 1
LOGITS_COPIES = 4  # fp32 (batch, vocabulary): logits, sorted, probabilities, workspace
FRAGMENTED = 0.02  # of the memory: allocators round up


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on the fullest GPU, without the KV cache."""

    vision_weights_bytes: int
    vision_activations_bytes: int
    llm_weights_bytes: int
    llm_activations_bytes: int
    prompt_table_bytes: int
    logits_bytes: int
    feature_cache_bytes: int
    triton_pool_bytes: int
    workspace_bytes: int
    context_bytes: int
    fragmentation_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class MemoryPlan:
    """kv_tokens: what the limits ask for; kv_tokens_that_fit: what the memory would hold."""

    parts: MemoryParts
    available_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def total_bytes(self) -> int:
        return self.parts.total_bytes + self.kv_cache_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes

    @property
    def kv_tokens_that_fit(self) -> int:
        free = self.available_bytes - self.parts.total_bytes
        return max(0, free // self.kv_bytes_per_token)


def memory_plan(
    spec: ModelSpec,
    *,
    limits: Limits,
    gpu: GpuModel,
    tp_size: int,
    precision: Precision,
    kv_cache: str,
) -> MemoryPlan:
    """Memory of GPU 0. tp_size must be a valid one of the model."""
    deployment = GpuDeployment(Path(), precision.name, tp_size)
    table_rows = limits.max_batch_size * limits.max_visual_tokens(spec)
    vocabulary = spec.llm.padded_vocab_size(tp_size)
    parts = MemoryParts(
        vision_weights_bytes=vision_weight_bytes(spec),
        vision_activations_bytes=vision_activation_bytes(spec.vision, limits.max_tiles_per_run),
        llm_weights_bytes=rank_weights(spec.llm, tp_size=tp_size, precision=precision).total_bytes,
        # Context is not chunked: one step may hold a whole prompt.
        llm_activations_bytes=llm_activation_bytes(spec.llm, limits.max_seq_len, tp_size),
        prompt_table_bytes=table_rows * spec.llm.hidden_size * BYTES_16_BIT,
        logits_bytes=LOGITS_COPIES * limits.max_batch_size * vocabulary * 4,
        feature_cache_bytes=limits.feature_cache_bytes,
        triton_pool_bytes=deployment.cuda_memory_pool_bytes(spec, limits),
        workspace_bytes=WORKSPACE_BYTES,
        context_bytes=CONTEXT_BYTES + (NCCL_BYTES if tp_size > 1 else 0),
        fragmentation_bytes=int(gpu.memory_bytes * FRAGMENTED),
    )
    per_token = kv_bytes_per_token(spec.llm, tp_size=tp_size, bytes_per_value=KV_CACHES[kv_cache])
    return MemoryPlan(parts, gpu.memory_bytes, per_token, limits.kv_cache_tokens)


def vision_activation_bytes(spec: VisionSpec, num_tiles: int) -> int:
    """The larger of a layer's two halves, in bf16, for num_tiles tiles at once.

    Attention: input, its norm, q, k, v and the output (6 x hidden), and twice the scores of all
    heads (positions^2 a tile). MLP: input, its norm and the output (3 x hidden), and the inner
    channels before and after GELU.
    """
    positions = num_tiles * spec.num_positions
    scores = num_tiles * spec.num_heads * spec.num_positions**2
    attention = positions * 6 * spec.hidden_size + 2 * scores
    mlp = positions * (3 * spec.hidden_size + 2 * spec.intermediate_size)
    return max(attention, mlp) * BYTES_16_BIT


def llm_activation_bytes(spec: LLMSpec, num_tokens: int, tp_size: int) -> int:
    """The larger of a layer's two halves on one rank, 16-bit, for a step of num_tokens tokens.

    Attention: input, its norm and the output (3 x hidden), q, k, v twice (the attention plugin
    writes them apart) and its result. MLP: the same three, and gate, fc and their product.
    """
    heads = spec.num_heads // tp_size * spec.head_dim
    kv_heads = max(spec.num_kv_heads // tp_size, 1) * spec.head_dim
    attention = 2 * (heads + 2 * kv_heads) + heads
    mlp = 3 * (spec.intermediate_size // tp_size)
    return num_tokens * (3 * spec.hidden_size + max(attention, mlp)) * BYTES_16_BIT
