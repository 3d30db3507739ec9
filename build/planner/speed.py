"""How fast: sections of the plan, by arithmetic (`PEAK`: a floor) and calibrated (an estimate)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from build.planner.calibration import CALIBRATED, PEAK, Calibration
from build.planner.deployment import Deployment
from build.planner.llm_time import LLMTime
from build.planner.max_load import MaxLoad, max_load
from build.planner.vision_time import vision_s
from build.planner.workload import Workload

__all__ = ["full_batch_size", "load_section", "shares_section", "single_section"]

Section = list[dict[str, Any]]
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def full_batch_size(deployment: Deployment, workload: Workload) -> int:
    """Requests at once: as many as the KV cache of the limits holds, at most max_batch_size.

    At least 1: the cache holds a request of max_seq_len.
    """
    limits = deployment.limits
    in_cache = limits.kv_cache_tokens // workload.total_tokens(deployment.spec)
    return min(limits.max_batch_size, in_cache)


def _with_batch(deployment: Deployment, workload: Workload, batch_size: int) -> Deployment:
    """The same with limits that hold batch_size such requests."""
    tokens = batch_size * workload.total_tokens(deployment.spec)
    limits = replace(deployment.limits, max_batch_size=batch_size, max_kv_cache_tokens=tokens)
    return replace(deployment, limits=limits)


def shares_section(deployment: Deployment, workload: Workload, batch_size: int) -> Section:
    """The share of every part in the time of a full batch."""
    shares = _max_load(deployment, workload, batch_size, CALIBRATED).shares()
    return [{"part": part, "share": share} for part, share in shares.items()]


def single_section(deployment: Deployment, workload: Workload) -> Section:
    """Time to the first token and between tokens, the limit of the hardware and an estimate."""
    spec = deployment.spec
    prompt_tokens = workload.prompt_tokens(spec)
    tiles_per_gpu = -(-workload.num_tiles // deployment.tp_size)

    def times(calibration: Calibration) -> dict[str, float]:
        llm = _llm(deployment, calibration)
        vision = 0.0
        if workload.num_tiles:
            vision = vision_s(spec, tiles_per_gpu, gpu=deployment.gpu, calibration=calibration)
        prefill = llm.prefill(prompt_tokens).total_s
        step = llm.step(1, prompt_tokens + workload.output_tokens / 2).total_s
        first = vision + prefill
        return {
            f"vision, {workload.num_tiles} tiles": vision,
            f"prefill, {prompt_tokens} tokens": prefill,
            "first token": first,
            "every further token": step,
            f"answer, {workload.output_tokens} tokens": first + (workload.output_tokens - 1) * step,
        }

    floors, estimates = times(PEAK), times(CALIBRATED)
    return [
        {"part": part, "floor_s": floors[part], "estimate_s": estimate}
        for part, estimate in estimates.items()
    ]


def load_section(deployment: Deployment, workload: Workload, batch_size: int) -> Section:
    """Batches within the limits, and the larger ones that would fit with larger limits."""
    larger = (size for size in BATCH_SIZES if size > batch_size)
    fitting = [size for size in larger if _with_batch(deployment, workload, size).memory().fits]
    rows = []
    for size in [*(size for size in BATCH_SIZES if size < batch_size), batch_size, *fitting]:
        load = _max_load(deployment, workload, size, CALIBRATED)
        floor = _max_load(deployment, workload, size, PEAK)
        rows.append(
            {
                "batch": size,
                "within the limits": "yes" if size <= batch_size else "",
                "step_s": load.step.total_s,
                "requests_per_s": load.requests_per_s,
                "output_tokens_per_s": load.output_tokens_per_s,
                "ceiling_output_tokens_per_s": floor.output_tokens_per_s,
            }
        )
    return rows


def _max_load(
    deployment: Deployment, workload: Workload, batch_size: int, calibration: Calibration
) -> MaxLoad:
    """Always batch_size requests generating; the GPUs share every request's tiles."""
    spec = deployment.spec
    share = workload.num_tiles * batch_size / deployment.tp_size
    vision = 0.0
    if share:
        vision = vision_s(spec, share, gpu=deployment.gpu, calibration=calibration) / batch_size
    return max_load(
        _llm(deployment, calibration),
        batch_size=batch_size,
        prompt_tokens=workload.prompt_tokens(spec),
        output_tokens=workload.output_tokens,
        vision_s_per_request=vision,
    )


def _llm(deployment: Deployment, calibration: Calibration) -> LLMTime:
    return LLMTime(
        deployment.spec.llm,
        gpu=deployment.gpu,
        tp_size=deployment.tp_size,
        precision=deployment.precision,
        kv_cache=deployment.kv_cache,
        calibration=calibration,
    )
