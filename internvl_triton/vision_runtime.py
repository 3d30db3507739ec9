"""Which engine the `vision_encoder` step runs: its parameter `runtime` says so."""

from __future__ import annotations

from typing import Any

from internvl_triton.artifacts import Artifacts
from internvl_triton.vision_engine import OnnxVisionEngine, VisionEngine

__all__ = ["ONNXRUNTIME", "TENSORRT", "load_vision_engine"]

ONNXRUNTIME = "onnxruntime"
TENSORRT = "tensorrt"


def load_vision_engine(artifacts: Artifacts, parameters: dict[str, str]) -> VisionEngine[Any]:
    """The engine that `parameters` of the model's config ask for.

    Raises ArtifactMismatch when its files are missing or are not this project's graph.
    """
    if parameters["runtime"] == ONNXRUNTIME:
        return OnnxVisionEngine(artifacts.vision_onnx)
    assert parameters["runtime"] == TENSORRT, parameters["runtime"]
    from internvl_triton.tensorrt_vision_engine import TensorrtVisionEngine

    return TensorrtVisionEngine.load(
        artifacts.vision_plan,
        num_gpus=int(parameters["num_gpus"]),
        table_dtype=parameters["table_dtype"],
    )
