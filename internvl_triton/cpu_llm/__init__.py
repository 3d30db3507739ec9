"""The CPU engine of the `tensorrt_llm` step: a TensorRT-LLM checkpoint executed rank by rank."""

from internvl_triton.cpu_llm.engine import CpuLlmEngine
from internvl_triton.cpu_llm.generation import (
    GENERATION_STAGES,
    EngineLimits,
    GenerationChunk,
    GenerationRequest,
    validate_request,
)

__all__ = [
    "GENERATION_STAGES",
    "CpuLlmEngine",
    "EngineLimits",
    "GenerationChunk",
    "GenerationRequest",
    "validate_request",
]
