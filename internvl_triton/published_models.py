"""config.json facts of the published sizes, for names, plans and tests.

PUBLISHED_MODELS are the seven InternVL2.5 ones. OTHER_GENERATIONS have the same towers, projector
and language model classes, so they convert too: InternVL2 has another prompt template, InternVL3
other Qwen2.5 sizes. NOT_CONVERTED says why by name.

Conversion never reads this table: it reads the checkpoint's own config.json. The numbers are
confirmed by the published parameter counts (`tests/unit/test_published_models.py`).
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "HUB_ORGANISATION",
    "NOT_CONVERTED",
    "OTHER_GENERATIONS",
    "PUBLISHED_MODELS",
    "published_config",
]

HUB_ORGANISATION = "OpenGVLab"

_VIT_300M: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
}
_VIT_6B: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "qk_normalization": True,
    "qkv_bias": False,
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151674,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}
_INTERNLM2: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": 92553,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rms_norm_eps": 1e-5,
    "bias": False,
}


def _llm(
    base: dict[str, Any], hidden: int, layers: int, heads: int, kv: int, inner: int, **more: Any
) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        **more,
    }


PUBLISHED_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "InternVL2_5-1B": (_VIT_300M, _llm(_QWEN2, 896, 24, 14, 2, 4864)),
    "InternVL2_5-2B": (_VIT_300M, _llm(_INTERNLM2, 2048, 24, 16, 8, 8192)),
    "InternVL2_5-4B": (_VIT_300M, _llm(_QWEN2, 2048, 36, 16, 2, 11008)),
    "InternVL2_5-8B": (_VIT_300M, _llm(_INTERNLM2, 4096, 32, 32, 8, 14336)),
    "InternVL2_5-26B": (
        _VIT_6B,
        _llm(
            _INTERNLM2,
            6144,
            48,
            48,
            8,
            16384,
            rope_theta=5e7,
            rope_scaling={"type": "dynamic", "factor": 2.5},
        ),
    ),
    "InternVL2_5-38B": (_VIT_6B, _llm(_QWEN2, 5120, 64, 40, 8, 27648)),
    "InternVL2_5-78B": (_VIT_6B, _llm(_QWEN2, 8192, 80, 64, 8, 29568)),
}

# InternVL2's Qwen2 adds its nine tokens to 151646; InternVL3's config.json names a rope scaling
# that is the identity up to 32768 positions.
_QWEN2_OF_2 = {**_QWEN2, "vocab_size": 151655}
_QWEN2_OF_3 = {**_QWEN2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
_HERMES, _INTERNLM_CHAT = {"template": "Hermes-2"}, {"template": "internlm2-chat"}
# name -> vision_config, llm_config, what differs at the top level
OTHER_GENERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "InternVL2-1B": (_VIT_300M, _llm(_QWEN2_OF_2, 896, 24, 14, 2, 4864), _HERMES),
    "InternVL2-2B": (_VIT_300M, _llm(_INTERNLM2, 2048, 24, 16, 8, 8192), _INTERNLM_CHAT),
    "InternVL2-8B": (_VIT_300M, _llm(_INTERNLM2, 4096, 32, 32, 8, 14336), _INTERNLM_CHAT),
    "InternVL2-26B": (_VIT_6B, _llm(_INTERNLM2, 6144, 48, 48, 8, 16384), _INTERNLM_CHAT),
    "InternVL3-1B": (_VIT_300M, _llm(_QWEN2_OF_3, 896, 24, 14, 2, 4864), {}),
    "InternVL3-2B": (_VIT_300M, _llm(_QWEN2_OF_3, 1536, 28, 12, 2, 8960), {}),
    "InternVL3-8B": (_VIT_300M, _llm(_QWEN2_OF_3, 3584, 28, 28, 4, 18944), {}),
    "InternVL3-14B": (_VIT_300M, _llm(_QWEN2_OF_3, 5120, 48, 40, 8, 13824), {}),
    "InternVL3-38B": (_VIT_6B, _llm(_QWEN2_OF_3, 5120, 64, 40, 8, 27648), {}),
    "InternVL3-78B": (_VIT_6B, _llm(_QWEN2_OF_3, 8192, 80, 64, 8, 29568), {}),
}
NOT_CONVERTED = {
    "InternVL2-4B": "its language model is Phi-3; use InternVL2_5-4B",
    "InternVL2-40B": "its language model is Yi-34B, a Llama; use InternVL2_5-38B",
    "InternVL2-Llama3-76B": "its language model is Llama 3; use InternVL2_5-78B",
    "InternVL3-9B": "its language model is InternLM3; use InternVL3-8B",
}


def published_config(
    name: str, *, vision_layers: int | None = None, llm_layers: int | None = None
) -> dict[str, Any]:
    """config.json of a published size, optionally with fewer layers.

    Raises KeyError for a name that is in neither table.
    """
    top: dict[str, Any] = {}
    if name in PUBLISHED_MODELS:
        vision, llm = PUBLISHED_MODELS[name]
    else:
        vision, llm, top = OTHER_GENERATIONS[name]
    config = chat_config(
        vision if vision_layers is None else {**vision, "num_hidden_layers": vision_layers},
        llm if llm_layers is None else {**llm, "num_hidden_layers": llm_layers},
    )
    return {**config, **top}


def chat_config(vision: dict[str, Any], llm: dict[str, Any]) -> dict[str, Any]:
    """The top level of config.json around a vision_config and an llm_config."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "force_image_size": 448,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "llm_config": dict(llm),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": 448,
            "patch_size": 14,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            **vision,
        },
    }
