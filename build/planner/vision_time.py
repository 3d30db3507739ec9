"""How long InternViT and the projector take: FLOPs over what the GPU does a second."""

from __future__ import annotations

from build.planner.calibration import Calibration
from build.planner.gpus import GpuModel
from build.planner.weights import vision_weight_bytes
from internvl_triton.model_spec import ModelSpec

__all__ = ["tile_operations", "vision_s"]


def tile_operations(spec: ModelSpec) -> int:
    """Floating point operations of one tile: 2 a weight and position, 4 a channel and pair.

    InternViT-6B: 1025 x 2 x 5.53e9 + 45 x 4 x 1025^2 x 3200 + projector = 12.0 TFLOP.
    """
    vision = spec.vision
    hidden, positions = vision.hidden_size, vision.num_positions
    layer = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    patch = 3 * vision.patch_size**2 * hidden
    attention = 4 * positions**2 * hidden
    projector = hidden * spec.shuffle_factor**2 * spec.llm.hidden_size + spec.llm.hidden_size**2
    return (
        vision.num_layers * (2 * positions * layer + attention)
        + 2 * (positions - 1) * patch
        + 2 * spec.tokens_per_tile * projector
    )


def vision_s(
    spec: ModelSpec, num_tiles: float, *, gpu: GpuModel, calibration: Calibration
) -> float:
    """Seconds for num_tiles tiles on one GPU, in bf16. The weights are read at least once."""
    compute = num_tiles * tile_operations(spec) / calibration.flops(gpu, "bf16")
    read = vision_weight_bytes(spec) / (gpu.bandwidth_bytes_per_s * calibration.bandwidth)
    return max(compute, read)
