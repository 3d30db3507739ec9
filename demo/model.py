"""The demo model for training: plain functions over a dict of weights.

The weights carry the names and shapes of the original format (Qwen2 layout), so a checkpoint is
this dict, written down. q, k and v have no biases: InternLM2 has none, and both layouts are
made from the same weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.model_spec import LLMSpec, ModelSpec, VisionSpec
from internvl_triton.published_models import chat_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Weights",
    "all_hidden_states",
    "demo_config",
    "hidden_states",
    "start_weights",
    "visual_features",
]

Weights = dict[str, "Tensor"]

_PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_POSITIONS = "vision_model.embeddings.position_embedding"


def demo_config(vocab_size: int, *, tile_size: int = 448) -> dict[str, Any]:
    """config.json of the demo model: 5 million parameters, 10 MB in bfloat16."""
    vision = {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "norm_type": "layer_norm",
        "qk_normalization": False,
        "qkv_bias": True,
        "image_size": tile_size,
    }
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": vocab_size,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    return {**chat_config(vision, llm), "force_image_size": tile_size}


def start_weights(spec: ModelSpec, *, seed: int) -> Weights:
    """Random float32 weights, the same for the same seed.

    Token embeddings are about as large as visual features: much smaller ones drown in what the
    first layer adds to them, and then no question about a word is understood. Position embeddings
    begin as waves: random ones took the tower hundreds of steps to tell left from right.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in checkpoint_shapes(spec).items():
        if name == _POSITIONS:
            weights[name] = _waves(spec.vision)
            continue
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            continue
        if name.endswith((".ls1", ".ls2")):
            weights[name] = torch.full(shape, 0.3)
        elif "norm" in name or name.startswith("mlp1.0."):
            weights[name] = torch.full(shape, float(name.endswith("weight")))
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            fan_in = shape[1] if len(shape) == 2 and "embed" not in name else 2500
            if "patch_embedding" in name:
                fan_in = 3 * spec.vision.patch_size**2
            scale = 1.0 if "embed_tokens" in name else min(0.06, fan_in**-0.5)
            weights[name] = torch.randn(shape, generator=generator) * scale
    return weights


def _waves(spec: VisionSpec) -> Tensor:
    """(1, 1 + side * side, hidden): sines and cosines of row and column, from one wave in six
    patches to ones longer than the tile; zero for the class token.
    """
    import torch

    side, count = spec.patches_per_side, spec.hidden_size // 4
    frequencies = side ** -torch.linspace(0, 1, count)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    patches = torch.cat([rows, columns], -1).flatten(0, 1)
    return 2.0 * torch.cat([torch.zeros(1, patches.shape[1]), patches])[None]


def visual_features(
    weights: Weights, tiles: Tensor, spec: ModelSpec, *, origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """uint8 (num_tiles, size, size, 3) -> float32 (num_tiles, tokens_per_tile, llm hidden).

    Tiles smaller than the 448 pixels of the weights' position embeddings are a window of such a
    tile. origin: row and column of the window's first patch.
    """
    import torch
    from torch.nn import functional

    vision = spec.vision
    if not len(tiles):
        return torch.empty(0, spec.tokens_per_tile, spec.llm.hidden_size)
    pixels = (tiles.float() - torch.tensor(_PIXEL_MEAN)) / torch.tensor(_PIXEL_STD)
    embeddings = "vision_model.embeddings."
    patches = functional.conv2d(
        pixels.permute(0, 3, 1, 2),
        weights[embeddings + "patch_embedding.weight"],
        weights[embeddings + "patch_embedding.bias"],
        stride=vision.patch_size,
    )
    x = patches.flatten(2).transpose(1, 2)
    classes = weights[embeddings + "class_embedding"].expand(len(x), -1, -1)
    x = torch.cat([classes, x], 1) + _window(weights[_POSITIONS], vision, origin)
    for layer in range(vision.num_layers):
        x = _vision_layer(weights, f"vision_model.encoder.layers.{layer}.", x, vision)
    return _project(weights, x[:, 1:], spec)


def _window(positions: Tensor, spec: VisionSpec, origin: tuple[int, int]) -> Tensor:
    """(1, 1 + side * side, hidden) -> the class token's and those of the window's patches."""
    import torch

    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (side, side))
    rows, columns = (slice(first, first + spec.patches_per_side) for first in origin)
    return torch.cat([positions[:, :1], grid[:, rows, columns].flatten(1, 2)], 1)


def _vision_layer(weights: Weights, prefix: str, x: Tensor, spec: VisionSpec) -> Tensor:
    from torch.nn import functional

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(
            value, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
        )

    def norm(name: str, value: Tensor) -> Tensor:
        return functional.layer_norm(
            value,
            (spec.hidden_size,),
            weights[f"{prefix}{name}.weight"],
            weights[f"{prefix}{name}.bias"],
            spec.layer_norm_eps,
        )

    batch, length, hidden = x.shape
    qkv = linear("attn.qkv", norm("norm1", x)).view(batch, length, 3, spec.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(q, k, v)
    attended = attended.transpose(1, 2).reshape(batch, length, hidden)
    x = x + linear("attn.proj", attended) * weights[prefix + "ls1"]
    inner = functional.gelu(linear("mlp.fc1", norm("norm2", x)))
    return x + linear("mlp.fc2", inner) * weights[prefix + "ls2"]


def _project(weights: Weights, patches: Tensor, spec: ModelSpec) -> Tensor:
    """Pixel shuffle (2 x 2 patches to one token), then LayerNorm, Linear, GELU, Linear."""
    from torch.nn import functional

    batch, _, hidden = patches.shape
    factor = spec.shuffle_factor
    side = spec.vision.patches_per_side // factor
    x = patches.reshape(batch, side, factor, side, factor, hidden).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, side * side, factor * factor * hidden)
    x = functional.layer_norm(x, x.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"])
    x = functional.gelu(functional.linear(x, weights["mlp1.1.weight"], weights["mlp1.1.bias"]))
    return functional.linear(x, weights["mlp1.3.weight"], weights["mlp1.3.bias"])


def hidden_states(
    weights: Weights, embeddings: Tensor, positions: Tensor, mask: Tensor, spec: LLMSpec
) -> Tensor:
    """The language model before its head, float32 (batch, length, hidden).

    embeddings: float32 (batch, length, hidden); positions: int64 (batch, length);
    mask: bool (batch, 1, length, length), True where a row may look at a column.
    """
    return all_hidden_states(weights, embeddings, positions, mask, spec)[-1]


def all_hidden_states(
    weights: Weights, embeddings: Tensor, positions: Tensor, mask: Tensor, spec: LLMSpec
) -> list[Tensor]:
    """As `hidden_states`, behind every layer, each through the final norm."""
    cos, sin = _rotations(positions, spec)
    x = embeddings
    states = []
    for layer in range(spec.num_layers):
        x = _llm_layer(weights, f"language_model.model.layers.{layer}.", x, cos, sin, mask, spec)
        states.append(_rms_norm(x, weights["language_model.model.norm.weight"], spec))
    return states


def _rotations(positions: Tensor, spec: LLMSpec) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (batch, 1, length, head_dim)."""
    import torch

    half = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
    angles = positions[:, None, :, None].float() * spec.rope_theta**-half
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rms_norm(x: Tensor, weight: Tensor, spec: LLMSpec) -> Tensor:
    from torch.nn import functional

    return functional.rms_norm(x, (spec.hidden_size,), weight, spec.norm_eps)


def _llm_layer(
    weights: Weights,
    prefix: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    spec: LLMSpec,
) -> Tensor:
    import torch
    from torch.nn import functional

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, weights[f"{prefix}{name}.weight"])

    def rotate(value: Tensor) -> Tensor:
        first, second = value.chunk(2, -1)
        return value * cos + torch.cat([-second, first], -1) * sin

    batch, length, _ = x.shape
    y = _rms_norm(x, weights[prefix + "input_layernorm.weight"], spec)
    q, k, v = (
        linear(f"self_attn.{name}_proj", y).view(batch, length, -1, spec.head_dim).transpose(1, 2)
        for name in "qkv"
    )
    groups = spec.num_heads // spec.num_kv_heads
    k, v = rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    attended = functional.scaled_dot_product_attention(rotate(q), k, v, attn_mask=mask)
    x = x + linear("self_attn.o_proj", attended.transpose(1, 2).reshape(batch, length, -1))
    y = _rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], spec)
    return x + linear(
        "mlp.down_proj", functional.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y)
    )
