"""InternViT, pixel shuffle and projector in plain PyTorch, fp32: the container's reference.

Transcribed from `modeling_intern_vit.py` and `modeling_internvl_chat.py` (OpenGVLab/InternVL @
2410d1d), because the container's transformers knows no InternVL. On a CPU,
tests/parity/test_gpu_references.py compares it with the port of a transformers that does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from safetensors.torch import load_file

from build.parity.port import pixel_values

__all__ = ["visual_features"]


@torch.no_grad()
def visual_features(checkpoint: Path, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (num_tiles, 448, 448, 3) -> float32 (num_tiles * 256, hidden). One safetensors file."""
    config = json.loads((checkpoint / "config.json").read_text())
    weights = {
        name: tensor.float()
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
        if not name.startswith("language_model.")
    }
    x = _tower(pixel_values(tiles), config["vision_config"], weights)[:, 1:]
    batch, patches, width = x.shape
    side = int(patches**0.5)
    x = x.reshape(batch, side, side // 2, 2 * width).permute(0, 2, 1, 3)
    x = x.reshape(batch, side // 2, side // 2, 4 * width).permute(0, 2, 1, 3)  # ps_version v2
    x = x.reshape(-1, 4 * width)
    x = nnf.layer_norm(x, (4 * width,), weights["mlp1.0.weight"], weights["mlp1.0.bias"], 1e-5)
    x = nnf.gelu(nnf.linear(x, weights["mlp1.1.weight"], weights["mlp1.1.bias"]))
    features: NDArray[np.float32] = nnf.linear(
        x, weights["mlp1.3.weight"], weights["mlp1.3.bias"]
    ).numpy()
    return features


def _tower(
    pixels: torch.Tensor, config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Hidden states (num_tiles, 1 + patches, width) behind the last layer."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config["norm_type"] == "layer_norm":
            return nnf.layer_norm(
                x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps
            )
        return rms_norm(x, name)

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[name + ".weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return nnf.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    embeddings = "vision_model.embeddings."
    patch = embeddings + "patch_embedding"
    kernel = weights[patch + ".weight"]
    x = nnf.conv2d(pixels, kernel, weights[patch + ".bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    first = weights[embeddings + "class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + weights[embeddings + "position_embedding"]
    for number in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}."
        q, k, v = linear(norm(x, layer + "norm1"), layer + "attn.qkv").chunk(3, -1)
        if config["qk_normalization"]:
            q, k = rms_norm(q, layer + "attn.q_norm"), rms_norm(k, layer + "attn.k_norm")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, layer + "attn.proj") * weights[layer + "ls1"]
        inner = nnf.gelu(linear(norm(x, layer + "norm2"), layer + "mlp.fc1"))
        x = x + linear(inner, layer + "mlp.fc2") * weights[layer + "ls2"]
    return x
