"""What the configs of the gpu profile say beyond those of the cpu profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tensor_contract import DType
from internvl_triton.vision_runtime import TENSORRT

__all__ = ["TABLE_DTYPES", "GpuDeployment"]

# The prompt table has the dtype of the language model's engine: TensorRT-LLM refuses another one
# with "Request embedding table data type doesn't match model weight data type".
# Its attention kernels know no float32.
TABLE_DTYPES: dict[str, DType] = {"bfloat16": "BF16", "float16": "FP16"}


@dataclass(frozen=True)
class GpuDeployment:
    """Engines of one model on one machine.

    engine_dir: the language model's engine, absolute: the backend reads a relative path from the
    server's working directory.
    dtype: of that engine's activations, as in the config.json of its checkpoint.
    num_gpus: ranks of the language model, and GPUs with a vision engine each.
    kv_cache: "fp8" or "int8" keys and values, None for 16 bits.
    tokenizer_info: the vocabulary for guided answers (`guides.xgrammar_tokenizer_info`), absolute;
    None: guides have no effect.
    """

    engine_dir: Path
    dtype: str
    num_gpus: int
    kv_cache: str | None = None
    tokenizer_info: Path | None = None

    @property
    def table_dtype(self) -> DType:
        return TABLE_DTYPES[self.dtype]

    def vision_parameters(self) -> dict[str, str]:
        return {
            "runtime": TENSORRT,
            "num_gpus": str(self.num_gpus),
            "table_dtype": self.table_dtype,
        }

    def llm_parameters(self, limits: Limits) -> dict[str, str]:
        """Parameters of backend `tensorrtllm`, as TensorRT-LLM 0.21 reads them.

        Sources: NVIDIA/TensorRT-LLM @ 0c8de69a, triton_backend/inflight_batcher_llm/src/
        {model_instance_state,model_state}.cc. A key that it does not find takes a default with a
        warning in the log; the last three make the model fail to load when they are absent.
        """
        return {
            "gpt_model_type": "inflight_fused_batching",
            "gpt_model_path": str(self.engine_dir),
            "FORCE_CPU_ONLY_INPUT_TENSORS": "no",  # the prompt table stays on its GPU
            "max_beam_width": "1",
            "decoding_mode": "top_k_top_p",
            "batch_scheduler_policy": "guaranteed_no_evict",
            # Not a fraction of what is free when it loads: the vision engine needs its memory.
            "max_tokens_in_paged_kv_cache": str(limits.kv_cache_tokens),
            "kv_cache_host_memory_bytes": "0",
            # Safe with prompt_table_extra_ids. A quantised KV cache has no paged context FMHA,
            # which reuse needs; fp8 with fp8 weights has, and answered wrongly with reuse
            # (NVIDIA/TensorRT-LLM issue 2699).
            "enable_kv_cache_reuse": "true" if self.kv_cache is None else "false",
            "enable_chunked_context": "false",
            "exclude_input_in_output": "true",  # the input has virtual ids
            # With "true", a log-prob is that among the top k only: 0 for every greedy token.
            "normalize_log_probs": "false",
            "cancellation_check_period_ms": "100",
            "stats_check_period_ms": "100",
            "tokenizer_dir": "",
            "guided_decoding_backend": "xgrammar" if self.tokenizer_info else "",
            "xgrammar_tokenizer_info_path": str(self.tokenizer_info or ""),
        }

    def cuda_memory_pool_bytes(self, spec: ModelSpec, limits: Limits) -> int:
        """Triton's pool on GPU 0, through which prompt tables pass from step to step: four of the
        largest, and not less than Triton's default of 64 MiB. What does not fit into it goes
        through pinned host memory."""
        table_bytes = limits.max_visual_tokens(spec) * spec.llm.hidden_size * 2
        return max(64 * 2**20, 4 * table_bytes)
