"""Vision graph -> TensorRT engine for the GPU of this machine."""

from __future__ import annotations

from pathlib import Path

from build.machine import Machine
from build.vision_engine import EngineReport, TileProfile, build_vision_engine
from internvl_triton.errors import EngineBuildFailed
from internvl_triton.limits import Limits

__all__ = ["build_vision_plan"]

PICTURE_TILES = 13  # 12 + thumbnail, InternVL2.5's default: the run that TensorRT tunes for
WORKSPACE_BYTES = 4 * 2**30  # scratch memory that one kernel may ask for


def build_vision_plan(
    onnx_path: Path, plan_path: Path, *, limits: Limits, machine: Machine, progress: bool = True
) -> EngineReport:
    """Compile for runs of 1 to limits.max_tiles_per_run tiles, strongly typed in bfloat16.

    Kernel timings are kept beside the plan, one file for each TensorRT and GPU, so that a second
    build is faster: TensorRT refuses those of another.
    Raises EngineBuildFailed; `plan_path` appears only when everything succeeded.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise EngineBuildFailed(
            "the package tensorrt is not installed here; run `make engines` with docker"
        ) from error
    most = limits.max_tiles_per_run
    measured_on = f"{machine.tensorrt} {machine.gpus[0].name}".replace(" ", "-")
    return build_vision_engine(
        onnx_path,
        plan_path,
        profile=TileProfile(1, min(PICTURE_TILES, most), most),
        trt=tensorrt,
        workspace_bytes=WORKSPACE_BYTES,
        timing_cache_path=plan_path.with_name(f"timing-{measured_on}.cache"),
        progress=progress,
    )
