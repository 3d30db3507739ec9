"""Deterministic random checkpoints in the original InternVL2.5 format, with tokenizer files.

Real weights are not needed to prove a conversion, a split or a batcher; they only make the
answers mean something. Every tensor is seeded by its own name, so a checkpoint with fewer
layers holds the same tensors as a deeper one.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from internvl_triton.checkpoint_layout import Shapes, checkpoint_shapes
from internvl_triton.model_spec import LLMFamily, ModelSpec
from internvl_triton.published_models import chat_config
from internvl_triton.safetensors_file import SafetensorsWriter
from internvl_triton.tiny_tokenizer import write_tiny_tokenizer

__all__ = ["tiny_config", "write_random_checkpoint"]

_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def tiny_config(
    family: LLMFamily,
    vit: Literal["300m", "6b"],
    *,
    head_dim: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    llm_layers: int = 2,
    vision_layers: int = 2,
    vision_hidden: int = 64,
    vision_heads: int = 2,
    vocab_size: int = 1283,
    max_position_embeddings: int = 32768,
) -> dict[str, Any]:
    """config.json of a small model with the true structure: 448-pixel tiles, 256 tokens each.

    `vit` selects the published tower's style: "300m" = LayerNorm and qkv bias, "6b" = RMSNorm
    and q/k RMSNorm over all heads, no qkv bias.
    """
    vision = {
        "hidden_size": vision_hidden,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "intermediate_size": 2 * vision_hidden,
        "norm_type": "layer_norm" if vit == "300m" else "rms_norm",
        "qk_normalization": vit == "6b",
        "qkv_bias": vit == "300m",
    }
    qwen2 = family == "qwen2"
    llm: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "InternLM2ForCausalLM"],
        "model_type": family,
        "hidden_size": num_heads * head_dim,
        "num_hidden_layers": llm_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": 2 * num_heads * head_dim,
        "vocab_size": vocab_size,
        "rope_theta": 1e6,
        "rope_scaling": None if qwen2 else {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-6 if qwen2 else 1e-5,
        "max_position_embeddings": max_position_embeddings,
        "hidden_act": "silu",
    }
    llm.update({"use_sliding_window": False} if qwen2 else {"bias": False})
    return chat_config(vision, llm)


def write_random_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F16", "F32"] = "BF16",
    shards: int = 1,
    zeros: bool | str = False,
    tokenizer: bool = True,
) -> Path:
    """Write config.json, safetensors shard(s) and tokenizer files; return `directory`.

    shards: number of safetensors files; 1 writes `model.safetensors` without an index.
    zeros: leave all weights zero as holes in sparse files, for sizes too big to fill; a text leaves
    only those whose names begin with it.
    tokenizer: write a tiny tokenizer of exactly config's vocab_size entries.
    """
    spec = ModelSpec.from_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer:
        write_tiny_tokenizer(directory, family=spec.llm.family, vocab_size=spec.llm.vocab_size)
    shapes = checkpoint_shapes(spec)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(_split(shapes, shards)):
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        )
        with SafetensorsWriter(
            directory / name, {tensor: (dtype, shape) for tensor, shape in part.items()}
        ) as writer:
            for tensor, shape in part.items():
                weight_map[tensor] = name
                if not (tensor.startswith(zeros) if isinstance(zeros, str) else zeros):
                    writer.write(tensor, random_tensor(tensor, shape, seed).astype(_DTYPES[dtype]))
    if shards > 1:
        index_json = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        (directory / "model.safetensors.index.json").write_text(index_json + "\n", encoding="utf-8")
    return directory


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Uniform random values whose scale keeps activations near 1 and makes every tensor matter.

    Only uniform draws are used: they are bit-identical on every platform.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    uniform = (2 * generator.random(shape, dtype=np.float32) - 1) * math.sqrt(3)  # variance 1
    leaf = name.rsplit(".", 1)[-1]
    is_norm = "norm" in name or name.startswith("mlp1.0.")
    if leaf in ("ls1", "ls2"):
        return (0.5 + 0.1 * uniform).astype(np.float32)
    if is_norm and leaf == "weight":
        return (1 + 0.1 * uniform).astype(np.float32)
    if leaf == "bias":
        return (0.1 * uniform).astype(np.float32)
    if "embed" in name:
        patch = "patch_embedding" in name
        scale = 1 / math.sqrt(math.prod(shape[1:])) if patch else 0.5
        return (scale * uniform).astype(np.float32)
    gain = 1.0
    if name.endswith(("lm_head.weight", "output.weight")):
        gain = 4.0
    elif any(part in name for part in ("q_proj", "k_proj", "wqkv")):
        gain = 2.5  # sharp attention: an answer then depends on single tokens, not on averages
    return (gain / math.sqrt(shape[-1]) * uniform).astype(np.float32)


def _split(shapes: Shapes, parts: int) -> Iterator[Shapes]:
    names = list(shapes)
    size = -(-len(names) // parts)
    for start in range(0, len(names), size):
        yield {name: shapes[name] for name in names[start : start + size]}
