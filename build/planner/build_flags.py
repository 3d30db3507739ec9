"""trtllm-build's flags for a deployment: those of `make engines`."""

from __future__ import annotations

from pathlib import Path

from build.llm_engine import trtllm_build_command
from build.planner.deployment import Deployment
from export import QUANT_ALGOS
from internvl_triton.artifacts import LLMBuild

__all__ = ["build_flags"]

NOT_SETTINGS = ("--checkpoint_dir", "--output_dir", "--output_timing_cache", "--log_level")


def build_flags(deployment: Deployment) -> dict[str, str]:
    """Flag -> value, without paths."""
    kv_cache = None if deployment.kv_cache == "auto" else deployment.kv_cache
    command = trtllm_build_command(
        Path("checkpoint"),
        Path("engine"),
        spec=deployment.spec,
        limits=deployment.limits,
        llm=LLMBuild(deployment.precision.name, deployment.tp_size, kv_cache),
        quant_algo=QUANT_ALGOS.get(deployment.precision.name),
        kv_cache_quant_algo=kv_cache and kv_cache.upper(),
    )
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    return {flag: value for flag, value in flags.items() if flag not in NOT_SETTINGS}
