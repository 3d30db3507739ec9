"""Names and shapes of the tensors in `rank{r}.safetensors` of a TensorRT-LLM 0.21 checkpoint.

Source: `LLaMAForCausalLM` and `QWenForCausalLM` in TensorRT-LLM 0.21 (`tensorrt_llm/models/{llama,
qwen}/model.py`, `layers/attention.py`, `layers/mlp.py`). Linear weights are (out, in). Both classes
have the same tensors; only Qwen2 has a qkv bias.
"""

from __future__ import annotations

from internvl_triton.checkpoint_layout import Shapes
from internvl_triton.model_spec import LLMSpec

__all__ = ["is_replicated", "kv_heads_per_rank", "rank_shapes"]


def kv_heads_per_rank(spec: LLMSpec, tp_size: int) -> int:
    """kv heads of one rank: at least 1, duplicated where there are more ranks than heads."""
    return max(spec.num_kv_heads // tp_size, 1)


def rank_shapes(spec: LLMSpec, tp_size: int) -> Shapes:
    """Tensors of one rank file; all ranks have the same shapes. tp_size must be a valid one.

    The embedding is a full copy (`use_parallel_embedding` false); the rows of lm_head are the
    vocabulary padded to a multiple of tp_size, divided by it.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size // tp_size
    heads = spec.num_heads // tp_size
    qkv = (heads + 2 * kv_heads_per_rank(spec, tp_size)) * spec.head_dim
    shapes: Shapes = {"transformer.vocab_embedding.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"transformer.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "attention.qkv.weight"] = (qkv, hidden)
        if spec.qkv_bias:
            shapes[prefix + "attention.qkv.bias"] = (qkv,)
        shapes[prefix + "attention.dense.weight"] = (hidden, heads * spec.head_dim)
        shapes[prefix + "post_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.fc.weight"] = (inner, hidden)
        shapes[prefix + "mlp.gate.weight"] = (inner, hidden)
        shapes[prefix + "mlp.proj.weight"] = (hidden, inner)
    shapes["transformer.ln_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (spec.padded_vocab_size(tp_size) // tp_size, hidden)
    return shapes


def is_replicated(name: str) -> bool:
    """Whether every rank holds the same bytes: the embedding and the norms."""
    return name.endswith(("vocab_embedding.weight", "layernorm.weight", "ln_f.weight"))
