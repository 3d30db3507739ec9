"""Parameters and bytes of weights on one GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from build.planner.precisions import Precision
from internvl_triton.checkpoint_layout import (
    Shapes,
    checkpoint_shapes,
    llm_shapes,
    projector_shapes,
    vision_shapes,
)
from internvl_triton.cpu_llm.rank_layout import kv_heads_per_rank, rank_shapes
from internvl_triton.model_spec import LLMSpec, ModelSpec

__all__ = [
    "RankWeights",
    "kv_bytes_per_token",
    "num_parameters",
    "parameter_counts",
    "rank_weights",
    "vision_weight_bytes",
]

BYTES_16_BIT = 2


def num_parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@cache
def parameter_counts(spec: ModelSpec) -> dict[str, int]:
    """Of the checkpoint, by part; "total" is the published number."""
    return {
        "vision tower": num_parameters(vision_shapes(spec.vision)),
        "projector": num_parameters(projector_shapes(spec)),
        "language model": num_parameters(llm_shapes(spec.llm)),
        "total": num_parameters(checkpoint_shapes(spec)),
    }


def vision_weight_bytes(spec: ModelSpec) -> int:
    """InternViT + projector in bf16: whole on every GPU, as the vision step is data parallel."""
    counts = parameter_counts(spec)
    return (counts["vision tower"] + counts["projector"]) * BYTES_16_BIT


@dataclass(frozen=True)
class RankWeights:
    """Language model weights of one GPU.

    embedding_bytes: the full copy that every rank has; a step reads only its tokens' rows.
    layer_parameters: of the linear weights in the layers; head_parameters: of lm_head.
    """

    embedding_bytes: int
    layer_bytes: int
    head_bytes: int
    layer_parameters: int
    head_parameters: int

    @property
    def total_bytes(self) -> int:
        return self.embedding_bytes + self.read_bytes

    @property
    def read_bytes(self) -> int:
        """What every decoding step reads."""
        return self.layer_bytes + self.head_bytes


@cache
def rank_weights(spec: LLMSpec, *, tp_size: int, precision: Precision) -> RankWeights:
    """Weights of one rank: vocabulary padded, kv heads duplicated, as the converter writes them.

    All ranks are equal. tp_size must be a valid one.
    """
    shapes = dict(rank_shapes(spec, tp_size))
    head = math.prod(shapes.pop("lm_head.weight"))
    embedding = math.prod(shapes.pop("transformer.vocab_embedding.weight"))
    linear = [shape for shape in shapes.values() if len(shape) == 2]
    others = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    quantised = sum(precision.linear_bytes(*shape) for shape in linear)
    return RankWeights(
        embedding_bytes=embedding * BYTES_16_BIT,
        layer_bytes=quantised + others * BYTES_16_BIT,
        head_bytes=head * BYTES_16_BIT,
        layer_parameters=sum(map(math.prod, linear)),
        head_parameters=head,
    )


def kv_bytes_per_token(spec: LLMSpec, *, tp_size: int, bytes_per_value: int) -> int:
    """Keys and values of one token on one GPU: 2 x layers x kv heads of a rank x head_dim x bytes.

    With more ranks than kv heads every rank still holds one whole head.
    """
    heads = kv_heads_per_rank(spec, tp_size)
    return 2 * spec.num_layers * heads * spec.head_dim * bytes_per_value
