"""Names and shapes of every tensor of an original-format InternVL2.5 checkpoint.

Source: `InternVLChatModel`, `InternVisionModel` and the two language models in
OpenGVLab/InternVL @ 2410d1d. Linear weights are (out, in).
"""

from __future__ import annotations

from internvl_triton.model_spec import LLMSpec, ModelSpec, VisionSpec

__all__ = ["Shapes", "checkpoint_shapes", "llm_shapes", "projector_shapes", "vision_shapes"]

Shapes = dict[str, tuple[int, ...]]


def vision_shapes(spec: VisionSpec) -> Shapes:
    """Tensors of `vision_model.*`. Row 0 of the position embedding is the class token's."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, hidden),
        "vision_model.embeddings.patch_embedding.weight": (
            hidden,
            3,
            spec.patch_size,
            spec.patch_size,
        ),
        "vision_model.embeddings.patch_embedding.bias": (hidden,),
        "vision_model.embeddings.position_embedding": (1, spec.num_positions, hidden),
    }
    for layer in range(spec.num_layers):
        prefix = f"vision_model.encoder.layers.{layer}."
        shapes[prefix + "attn.qkv.weight"] = (3 * hidden, hidden)
        if spec.qkv_bias:
            shapes[prefix + "attn.qkv.bias"] = (3 * hidden,)
        if spec.qk_normalization:
            shapes[prefix + "attn.q_norm.weight"] = (hidden,)
            shapes[prefix + "attn.k_norm.weight"] = (hidden,)
        shapes[prefix + "attn.proj.weight"] = (hidden, hidden)
        shapes[prefix + "attn.proj.bias"] = (hidden,)
        shapes[prefix + "mlp.fc1.weight"] = (inner, hidden)
        shapes[prefix + "mlp.fc1.bias"] = (inner,)
        shapes[prefix + "mlp.fc2.weight"] = (hidden, inner)
        shapes[prefix + "mlp.fc2.bias"] = (hidden,)
        for norm in ("norm1", "norm2"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
            if spec.norm_type == "layer_norm":
                shapes[f"{prefix}{norm}.bias"] = (hidden,)
        shapes[prefix + "ls1"] = (hidden,)
        shapes[prefix + "ls2"] = (hidden,)
    return shapes


def projector_shapes(spec: ModelSpec) -> Shapes:
    """Tensors of `mlp1.*`: LayerNorm, Linear, GELU, Linear."""
    shuffled = spec.vision.hidden_size * spec.shuffle_factor**2
    hidden = spec.llm.hidden_size
    return {
        "mlp1.0.weight": (shuffled,),
        "mlp1.0.bias": (shuffled,),
        "mlp1.1.weight": (hidden, shuffled),
        "mlp1.1.bias": (hidden,),
        "mlp1.3.weight": (hidden, hidden),
        "mlp1.3.bias": (hidden,),
    }


def llm_shapes(spec: LLMSpec) -> Shapes:
    """Tensors of `language_model.*` in the family's own names. The head is never tied."""
    if spec.family == "internlm2":
        return _internlm2_shapes(spec)
    return _qwen2_shapes(spec)


def checkpoint_shapes(spec: ModelSpec) -> Shapes:
    """All tensors of the checkpoint."""
    return {**vision_shapes(spec.vision), **projector_shapes(spec), **llm_shapes(spec.llm)}


def _qwen2_shapes(spec: LLMSpec) -> Shapes:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    rows = {
        "q": spec.num_heads * spec.head_dim,
        "k": spec.num_kv_heads * spec.head_dim,
        "v": spec.num_kv_heads * spec.head_dim,
    }
    shapes: Shapes = {"language_model.model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"language_model.model.layers.{layer}."
        for name, out in rows.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out, hidden)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, rows["q"])
        shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["language_model.model.norm.weight"] = (hidden,)
    shapes["language_model.lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _internlm2_shapes(spec: LLMSpec) -> Shapes:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    shapes: Shapes = {"language_model.model.tok_embeddings.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"language_model.model.layers.{layer}."
        shapes[prefix + "attention.wqkv.weight"] = (qkv, hidden)
        shapes[prefix + "attention.wo.weight"] = (hidden, spec.num_heads * spec.head_dim)
        shapes[prefix + "feed_forward.w1.weight"] = (inner, hidden)
        shapes[prefix + "feed_forward.w3.weight"] = (inner, hidden)
        shapes[prefix + "feed_forward.w2.weight"] = (hidden, inner)
        shapes[prefix + "attention_norm.weight"] = (hidden,)
        shapes[prefix + "ffn_norm.weight"] = (hidden,)
    shapes["language_model.model.norm.weight"] = (hidden,)
    shapes["language_model.output.weight"] = (spec.vocab_size, hidden)
    return shapes
