"""trtllm-build's flags for a deployment: those of `make engines`, adapted to its quantisation."""

from __future__ import annotations

from pathlib import Path

from build.llm_engine import trtllm_build_command
from build.planner.deployment import Deployment
from internvl_triton.artifacts import LLMBuild

__all__ = ["build_flags"]

NOT_SETTINGS = ("--checkpoint_dir", "--output_dir", "--output_timing_cache", "--log_level")


def build_flags(deployment: Deployment) -> dict[str, str]:
    """Flag -> value, without paths.

    TensorRT-LLM 0.21 (`tensorrt_llm/builder.py`) would change these by itself, with a warning
    only: an int8 KV cache, or an fp8 one without fp8 weights, goes without paged context FMHA,
    and so without KV reuse; fp8 weights and KV cache use fp8 context FMHA; only fp8 and
    unquantised MLPs are fused.
    """
    command = trtllm_build_command(
        Path("checkpoint"),
        Path("engine"),
        spec=deployment.spec,
        limits=deployment.limits,
        llm=LLMBuild(deployment.precision.name, deployment.tp_size),
    )
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    is_fp8 = deployment.precision.compute == "fp8"
    if deployment.kv_cache == "fp8" and is_fp8:
        flags["--use_fp8_context_fmha"] = "enable"
    elif deployment.kv_cache != "auto":
        flags["--use_paged_context_fmha"] = "disable"
    if deployment.precision.is_quantised and not is_fp8:
        flags["--use_fused_mlp"] = "disable"
    return {flag: value for flag, value in flags.items() if flag not in NOT_SETTINGS}
