"""InternViT, pixel shuffle and projector as ONNX nodes.

Source of the architecture: `modeling_intern_vit.py` and `modeling_internvl_chat.py` in
OpenGVLab/InternVL @ 2410d1d.

Everything is float32 in the file. Casts whose name ends in "/to_compute" mark where an engine
builder puts its own type; "/to_float" opens what must stay float32 even then: the norms, GELU and
the scale of q, which PyTorch evaluates in float32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.onnx_graph import OnnxGraph
from internvl_triton.model_spec import ModelSpec
from internvl_triton.vision_engine import PROMPT_EMBEDDING_TABLE, TILES, TO_COMPUTE, TO_FLOAT

__all__ = ["VisionGraph"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the model card uses
PROJECTOR_EPS = 1e-5  # torch's default in `mlp1.0`, not the tower's layer_norm_eps
FLOAT = 1  # onnx.TensorProto.FLOAT


class VisionGraph:
    """Writes `spec`'s vision graph to `graph`; each weight comes from `read(name)`, once.

    Methods take and return the names of values; `source` is a prefix of checkpoint tensors.
    """

    def __init__(
        self, graph: OnnxGraph, spec: ModelSpec, read: Callable[[str], NDArray[Any]]
    ) -> None:
        self.graph, self.node, self.spec, self.read = graph, graph.node, spec, read
        self.vision = spec.vision

    def write(self) -> None:
        spec, hidden = self.spec, self.spec.llm.hidden_size
        x = self.embeddings(self.normalised_tiles())
        for layer in range(self.vision.num_layers):
            x = self.layer(f"layer.{layer}", x, f"vision_model.encoder.layers.{layer}")
        features = self.projector(self.pixel_shuffle(x))
        self.reshape(PROMPT_EMBEDDING_TABLE, features, [-1, hidden])
        size = spec.tile_size
        self.graph.save(
            "internvl_vision_encoder",
            inputs={TILES: ("UINT8", ["num_tiles", size, size, 3])},
            outputs={PROMPT_EMBEDDING_TABLE: ("FLOAT", ["num_visual_tokens", hidden])},
            metadata={
                "tokens_per_tile": str(spec.tokens_per_tile),
                "max_tiles_with_thumbnail": str(spec.max_tiles_with_thumbnail),
            },
        )

    def normalised_tiles(self) -> str:
        """(x / 255 - mean) / std in float32. The cast comes first: TensorRT moves no uint8."""
        graph = self.graph
        x = self.node("Cast", "normalise/tiles" + TO_FLOAT, TILES, to=FLOAT)
        x = self.node("Div", "normalise/unit_range", x, graph.constant("normalise/255", 255))
        x = self.node("Sub", "normalise/minus_mean", x, graph.constant("normalise/mean", MEAN))
        x = self.node("Div", "normalise/over_std", x, graph.constant("normalise/std", STD))
        return self.to_compute("normalise", x)

    def embeddings(self, pixels: str) -> str:
        """Pixels (n, H, W, 3) -> class token and patches (n, 1 + patches, hidden).

        The patch convolution does not overlap, so it is one matrix product over (row, column,
        channel) of a patch. Position embeddings fit the tile size: nothing to interpolate.
        """
        name, side, patch = "embeddings", self.vision.patches_per_side, self.vision.patch_size
        hidden = self.vision.hidden_size
        x = self.reshape(f"{name}/rows", pixels, [-1, side, patch, side, patch, 3])
        x = self.node("Transpose", f"{name}/cut", x, perm=[0, 1, 3, 2, 4, 5])
        x = self.reshape(f"{name}/patches", x, [-1, side * side, patch * patch * 3])
        source = "vision_model.embeddings."
        kernel = self.read(source + "patch_embedding.weight")  # (hidden, 3, patch, patch)
        matrix = kernel.transpose(2, 3, 1, 0).reshape(-1, hidden)
        x = self.node("MatMul", f"{name}/project", x, self.weight(f"{name}/kernel", matrix))
        x = self.add_bias(f"{name}/project", x, source + "patch_embedding.bias")

        shape = self.node("Shape", f"{name}/num_tiles", TILES, start=0, end=1)
        one_row = self.graph.constant(f"{name}/one_row", [1, hidden], np.int64)
        shape = self.node("Concat", f"{name}/class_shape", shape, one_row, axis=0)
        token = self.weight(f"{name}/class_token", self.read(source + "class_embedding"))
        token = self.node("Expand", f"{name}/class_tokens", token, shape)
        x = self.node("Concat", f"{name}/tokens", token, x, axis=1)
        positions = self.weight(f"{name}/positions", self.read(source + "position_embedding"))
        return self.node("Add", f"{name}/add_positions", x, positions)

    def layer(self, name: str, x: str, source: str) -> str:
        """x + attn(norm1(x)) * ls1, then x + mlp(norm2(x)) * ls2."""
        for part, norm, scale in (
            (self.attention, "norm1", "ls1"),
            (self.mlp, "norm2", "ls2"),
        ):
            title = "attention" if norm == "norm1" else "mlp"
            y = self.norm(f"{name}/{norm}", x, f"{source}.{norm}")
            y = part(f"{name}/{title}", y, source)
            factor = self.weight(f"{name}/{scale}/weight", self.read(f"{source}.{scale}"))
            y = self.node("Mul", f"{name}/{scale}", y, factor)
            x = self.node("Add", f"{name}/{title}/residual", x, y)
        return x

    def attention(self, name: str, x: str, source: str) -> str:
        """softmax(q k^T / sqrt(head_dim)) v. q and k are normalised over all heads at once."""
        vision = self.vision
        x = self.linear(f"{name}/qkv", x, f"{source}.attn.qkv", bias=vision.qkv_bias)
        q, k, v = self.graph.nodes(
            "Split", f"{name}/split", x, outputs=[f"{name}/{part}" for part in "qkv"], axis=-1
        )
        if vision.qk_normalization:
            q = self.rms_norm(f"{name}/q_norm", q, f"{source}.attn.q_norm")
            k = self.rms_norm(f"{name}/k_norm", k, f"{source}.attn.k_norm")
        q = self.to_float(f"{name}/scale_q", q)
        scale = self.graph.constant(f"{name}/scale", vision.head_dim**-0.5)
        q = self.to_compute(f"{name}/scale_q", self.node("Mul", f"{name}/scale_q", q, scale))
        q = self.heads(f"{name}/q_heads", q, [0, 2, 1, 3])
        k = self.heads(f"{name}/k_heads", k, [0, 2, 3, 1])
        v = self.heads(f"{name}/v_heads", v, [0, 2, 1, 3])
        scores = self.node("MatMul", f"{name}/scores", q, k)
        weights = self.node("Softmax", f"{name}/softmax", scores, axis=-1)
        x = self.node("MatMul", f"{name}/mix", weights, v)
        x = self.node("Transpose", f"{name}/merge_heads", x, perm=[0, 2, 1, 3])
        x = self.reshape(f"{name}/tokens", x, [0, 0, vision.hidden_size])
        return self.linear(f"{name}/output", x, f"{source}.attn.proj")

    def heads(self, name: str, x: str, perm: list[int]) -> str:
        split = [0, 0, self.vision.num_heads, self.vision.head_dim]
        return self.node("Transpose", name, self.reshape(f"{name}/split", x, split), perm=perm)

    def mlp(self, name: str, x: str, source: str) -> str:
        x = self.linear(f"{name}/fc1", x, f"{source}.mlp.fc1")
        return self.linear(f"{name}/fc2", self.gelu(f"{name}/gelu", x), f"{source}.mlp.fc2")

    def pixel_shuffle(self, x: str) -> str:
        """Without the class token, f x f patches become one token of f * f * hidden.

        "v1" leaves out the reference's last permute: its tokens come column by column.
        """
        name, factor, hidden = "pixel_shuffle", self.spec.shuffle_factor, self.vision.hidden_size
        bounds = (("start", 1), ("end", self.vision.num_positions), ("axis", 1))
        cut = [self.graph.constant(f"{name}/{key}", [at], np.int64) for key, at in bounds]
        x = self.node("Slice", f"{name}/drop_class_token", x, *cut)
        side = self.vision.patches_per_side // factor
        x = self.reshape(f"{name}/split", x, [-1, side, factor, side, factor, hidden])
        perm = [0, 1, 3, 2, 4, 5] if self.spec.ps_version == "v2" else [0, 3, 1, 2, 4, 5]
        x = self.node("Transpose", f"{name}/gather", x, perm=perm)
        return self.reshape(f"{name}/tokens", x, [-1, side * side, factor * factor * hidden])

    def projector(self, x: str) -> str:
        x = self.layer_norm("projector/norm", x, "mlp1.0", PROJECTOR_EPS)
        x = self.gelu("projector/gelu", self.linear("projector/fc1", x, "mlp1.1"))
        return self.linear("projector/fc2", x, "mlp1.3")

    def norm(self, name: str, x: str, source: str) -> str:
        if self.vision.norm_type == "rms_norm":
            return self.rms_norm(name, x, source)
        return self.layer_norm(name, x, source, self.vision.layer_norm_eps)

    def rms_norm(self, name: str, x: str, source: str) -> str:
        """x / sqrt(mean(x^2) + eps) in float32, cast before the weight is multiplied."""
        graph = self.graph
        x = self.to_float(name, x)
        square = self.node("Pow", f"{name}/square", x, graph.constant(f"{name}/two", 2))
        mean = self.node("ReduceMean", f"{name}/mean", square, axes=[-1], keepdims=1)
        eps = graph.constant(f"{name}/eps", self.vision.layer_norm_eps)
        root = self.node("Sqrt", f"{name}/rms", self.node("Add", f"{name}/add_eps", mean, eps))
        x = self.to_compute(name, self.node("Div", f"{name}/divide", x, root))
        weight = self.weight(f"{name}/weight", self.read(f"{source}.weight"))
        return self.node("Mul", f"{name}/multiply", x, weight)

    def layer_norm(self, name: str, x: str, source: str, eps: float) -> str:
        x = self.to_float(name, x)
        weight, bias = (
            self.to_float(
                part, self.graph.weight(part, self.read(f"{source}.{part[len(name) + 1 :]}"))
            )
            for part in (f"{name}/weight", f"{name}/bias")
        )
        x = self.node("LayerNormalization", f"{name}/normalise", x, weight, bias, epsilon=eps)
        return self.to_compute(name, x)

    def gelu(self, name: str, x: str) -> str:
        """x * (1 + erf(x / sqrt(2))) / 2."""
        graph = self.graph
        x = self.to_float(name, x)
        y = self.node("Div", f"{name}/divide", x, graph.constant(f"{name}/sqrt2", 2**0.5))
        y = self.node("Erf", f"{name}/erf", y)
        y = self.node("Add", f"{name}/add", y, graph.constant(f"{name}/one", 1))
        y = self.node("Mul", f"{name}/multiply", x, y)
        y = self.node("Mul", f"{name}/halve", y, graph.constant(f"{name}/half", 0.5))
        return self.to_compute(name, y)

    def linear(self, name: str, x: str, source: str, *, bias: bool = True) -> str:
        """x W^T + b: W is transposed on its way to the file."""
        matrix = self.weight(f"{name}/weight", self.read(f"{source}.weight").T)
        x = self.node("MatMul", name, x, matrix)
        return self.add_bias(name, x, f"{source}.bias") if bias else x

    def add_bias(self, name: str, x: str, source: str) -> str:
        bias = self.weight(f"{name}/bias", self.read(source))
        return self.node("Add", f"{name}/add_bias", x, bias)

    def weight(self, name: str, array: NDArray[Any]) -> str:
        return self.to_compute(name, self.graph.weight(name, array))

    def reshape(self, name: str, x: str, shape: list[int]) -> str:
        """0 in `shape` keeps a dimension, -1 is the number of tiles or of visual tokens."""
        target = self.graph.constant(f"{name}/shape", shape, np.int64)
        return self.node("Reshape", name, x, target)

    def to_compute(self, name: str, x: str) -> str:
        return self.node("Cast", name + TO_COMPUTE, x, to=FLOAT)

    def to_float(self, name: str, x: str) -> str:
        return self.node("Cast", name + TO_FLOAT, x, to=FLOAT)
