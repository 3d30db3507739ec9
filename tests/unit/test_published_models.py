from __future__ import annotations

import math

import pytest

from internvl_triton.checkpoint_layout import checkpoint_shapes, projector_shapes, vision_shapes
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config

# The model card's and the published files' totals: name -> (all parameters, those of mlp1).
PARAMETERS = {
    "InternVL2_5-1B": (938_193_024, 4_482_816),
    "InternVL2_5-2B": (2_205_754_368, 12_595_200),
    "InternVL2_5-4B": (3_712_637_952, 12_595_200),
    "InternVL2_5-8B": (8_075_365_376, 33_570_816),
    "InternVL2_5-26B": (25_514_186_112, 116_429_824),
    "InternVL2_5-38B": (38_388_164_992, 91_786_240),
    "InternVL2_5-78B": (78_408_318_336, 172_008_448),
}


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_parameter_counts_equal_the_published_ones(name: str) -> None:
    spec = ModelSpec.from_config(published_config(name))
    total, projector = PARAMETERS[name]
    assert _count(checkpoint_shapes(spec)) == total
    assert _count(projector_shapes(spec)) == projector
    tower = 304_012_288 if spec.vision.hidden_size == 1024 else 5_536_496_000
    assert _count(vision_shapes(spec.vision)) == tower


def test_tensor_parallel_sizes_that_work() -> None:
    valid = {
        name: ModelSpec.from_config(published_config(name)).llm.valid_tp_sizes
        for name in PUBLISHED_MODELS
    }
    assert valid.pop("InternVL2_5-1B") == (1, 2)  # 14 heads
    assert set(valid.values()) == {(1, 2, 4, 8)}
