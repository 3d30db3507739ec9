"""How long the language model takes: FLOPs and bytes over what the GPU does a second.

One rank's time; the ranks work in step. Formulas: a dense layer does 2 operations a weight and
token; causal attention 4 a layer, query channel and pair of tokens, halved; a decoding step reads
every weight once and the keys and values of all its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.planner.calibration import Calibration
from build.planner.gpus import GpuModel
from build.planner.precisions import KV_CACHES, Precision
from build.planner.weights import BYTES_16_BIT, kv_bytes_per_token, rank_weights
from internvl_triton.model_spec import LLMSpec

__all__ = ["LLMTime", "TimeParts"]

ALL_REDUCES_PER_LAYER = 2  # after attention.dense and after mlp.proj


@dataclass(frozen=True)
class TimeParts:
    """Seconds by cause."""

    matmul_s: float
    attention_s: float
    all_reduce_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        return self.matmul_s + self.attention_s + self.all_reduce_s + self.overhead_s


class LLMTime:
    """The language model on tp_size GPUs."""

    def __init__(
        self,
        spec: LLMSpec,
        *,
        gpu: GpuModel,
        tp_size: int,
        precision: Precision,
        kv_cache: str,
        calibration: Calibration,
    ) -> None:
        self._spec = spec
        self._gpu = gpu
        self._tp_size = tp_size
        self._compute = precision.compute
        self._calibration = calibration
        self._weights = rank_weights(spec, tp_size=tp_size, precision=precision)
        self._kv_bytes = kv_bytes_per_token(
            spec, tp_size=tp_size, bytes_per_value=KV_CACHES[kv_cache]
        )
        self._bytes_per_s = gpu.bandwidth_bytes_per_s * calibration.bandwidth

    def prefill(self, prompt_tokens: int, num_prompts: int = 1) -> TimeParts:
        """num_prompts prompts of prompt_tokens each, together: the weights are read once.

        lm_head runs on the last token of each.
        """
        num_tokens = num_prompts * prompt_tokens
        channels = self._spec.num_heads * self._spec.head_dim // self._tp_size
        operations = 4 * self._spec.num_layers * channels * prompt_tokens**2 / 2 * num_prompts
        return TimeParts(
            matmul_s=max(self._layers_s(num_tokens) + self._head_s(num_prompts), self._weights_s),
            attention_s=operations / self._calibration.flops(self._gpu, "bf16"),
            all_reduce_s=self._all_reduce_s(num_tokens),
            overhead_s=0.0,
        )

    def step(self, batch_size: float, context_tokens: float) -> TimeParts:
        """One decoding step of batch_size sequences with context_tokens tokens each, on average."""
        compute = self._layers_s(batch_size) + self._head_s(batch_size)
        return TimeParts(
            matmul_s=max(compute, self._weights_s),
            attention_s=batch_size * context_tokens * self._kv_bytes / self._bytes_per_s,
            all_reduce_s=self._all_reduce_s(batch_size),
            overhead_s=batch_size * self._calibration.sequence_s,
        )

    @property
    def _weights_s(self) -> float:
        return self._weights.read_bytes / self._bytes_per_s

    def _layers_s(self, num_tokens: float) -> float:
        flops = self._calibration.flops(self._gpu, self._compute)
        return 2 * self._weights.layer_parameters * num_tokens / flops

    def _head_s(self, num_tokens: float) -> float:
        flops = self._calibration.flops(self._gpu, "bf16")
        return 2 * self._weights.head_parameters * num_tokens / flops

    def _all_reduce_s(self, num_tokens: float) -> float:
        """A ring sends and receives 2 (tp - 1) / tp of the 16-bit tensor (tokens, hidden)."""
        if self._tp_size == 1:
            return 0.0
        size = num_tokens * self._spec.hidden_size * BYTES_16_BIT
        sent = 2 * (self._tp_size - 1) / self._tp_size * size
        link = self._gpu.link_bytes_per_s * self._calibration.link[self._gpu.link]
        count = ALL_REDUCES_PER_LAYER * self._spec.num_layers
        return count * (self._calibration.all_reduce_s + sent / link)
