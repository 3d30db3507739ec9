"""config.json of a TensorRT-LLM 0.21 checkpoint.

Fields: `PretrainedConfig`, `QuantConfig` (`tensorrt_llm/models/modeling_utils.py`), `LLaMAConfig`,
`QWenConfig` (`models/{llama,qwen}/config.py`) and `Mapping` (`mapping.py`) of TensorRT-LLM 0.21.
"""

from __future__ import annotations

from typing import Any

from internvl_triton.model_spec import LLMFamily, LLMSpec

__all__ = ["trtllm_config"]

# `trtllm-build` looks the class up by this name in `MODEL_MAP` (`tensorrt_llm/models/__init__.py`),
# whose keys are transformers' names: its own LLaMAForCausalLM is none of them.
ARCHITECTURES: dict[LLMFamily, str] = {
    "qwen2": "Qwen2ForCausalLM",  # -> QWenForCausalLM
    "internlm2": "InternLM2ForCausalLM",  # -> LLaMAForCausalLM
}


def trtllm_config(
    spec: LLMSpec,
    *,
    tp_size: int,
    dtype: str,
    quant_algo: str | None = None,
    kv_cache_quant_algo: str | None = None,
) -> dict[str, Any]:
    """The whole config.json. `dtype`: "bfloat16", "float16" or "float32".

    quant_algo: None; "W8A16" / "W4A16" for weights that are quantised at load; or what a calibrated
    checkpoint holds (`export/precision.py`). Only W4A16_AWQ has groups and factors by which inputs
    are multiplied first: for the others `group_size` is the class's default and unused.
    kv_cache_quant_algo: None, "FP8" or "INT8".
    `exclude_modules` null means 0.21's own list, which leaves out embedding and lm_head
    (`quantize_layers` in `tensorrt_llm/quantization/quantize.py`); a list of ours would replace it.

    `vocab_size` is the unpadded one: token ids from there on select rows of the prompt table.
    `rotary_scaling` is null for both families: InternLM2's dynamic NTK is the identity up to
    max_position_embeddings, and 0.21 would scale the positions of the prompt but not the answer's.
    """
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES[spec.family],
        "dtype": dtype,
        "logits_dtype": "float32",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_size": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "hidden_act": "silu",
        "norm_epsilon": spec.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": spec.max_position_embeddings,
        "rotary_embedding_dim": spec.head_dim,
        "rotary_base": spec.rope_theta,
        "rotary_scaling": None,
        "qk_layernorm": False,
        "attn_bias": spec.qkv_bias,
        "mlp_bias": False,
        "moe": None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "disable_weight_only_quant_plugin": False,
        "tie_word_embeddings": False,
        "runtime_defaults": None,
        "mapping": {
            "world_size": tp_size,
            "tp_size": tp_size,
            "pp_size": 1,
            "cp_size": 1,
            "moe_tp_size": tp_size,
            "moe_ep_size": 1,
            "gpus_per_node": 8,
        },
        "quantization": {
            "quant_algo": quant_algo,
            "kv_cache_quant_algo": kv_cache_quant_algo,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": quant_algo == "W4A16_AWQ",
            "exclude_modules": None,
        },
    }
    if spec.family == "qwen2":
        config |= {
            "qwen_type": "qwen2",
            "seq_length": 8192,
            "use_logn_attn": False,
            "num_labels": 1,
            "moe_intermediate_size": 0,
            "moe_shared_expert_intermediate_size": 0,
        }
    else:
        config["residual_mlp"] = False
    return config
