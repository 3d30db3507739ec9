"""What would fit instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from build.planner.deployment import Deployment
from build.planner.gpus import GPUS
from build.planner.precisions import PRECISIONS
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["gib", "smallest_tp_size", "what_would_fit"]

GIB = 2**30
BLOCK_TOKENS = 32  # of the paged KV cache
SHORTEST_SEQ_LEN = 4096  # a picture of 3328 visual tokens, a question and an answer
SMALLER_PRECISIONS = ("fp8", "int8", "int4_awq")


def what_would_fit(deployment: Deployment) -> list[str]:
    """Ways out, each with the memory that it takes, the one that gives up least first.

    One change each: TP, limits, precision or GPU; two, of which one is TP, if one is not enough.
    """
    ways = [
        *_other_tp_size(deployment),
        *_smaller_limits(deployment),
        *_smaller_precision(deployment),
    ]
    if not ways:
        ways = _with_other_tp_size(deployment)
    return [*ways, *_other_gpus(deployment)]


def smallest_tp_size(deployment: Deployment) -> int | None:
    """The smallest TP with which everything else fits as it is, or None."""
    for tp_size in deployment.spec.llm.valid_tp_sizes:
        if replace(deployment, tp_size=tp_size).fits:
            return tp_size
    return None


def _other_tp_size(deployment: Deployment) -> list[str]:
    tp_size = smallest_tp_size(deployment)
    if tp_size is None:
        return []
    return [_way(f"TP={tp_size}", replace(deployment, tp_size=tp_size))]


def _smaller_limits(deployment: Deployment) -> list[str]:
    smaller = smaller_limits(deployment)
    if smaller is None:
        return []
    options = " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in smaller.to_json().items()
        if value != deployment.limits.to_json()[name]
    )
    return [_way(options, replace(deployment, limits=smaller))]


def _smaller_precision(deployment: Deployment) -> list[str]:
    for name in SMALLER_PRECISIONS:
        other = replace(deployment, precision=PRECISIONS[name])
        if other.precision.bits < deployment.precision.bits and other.fits:
            return [_way(f"PRECISION={name}", other)]
    return []


def _with_other_tp_size(deployment: Deployment) -> list[str]:
    for tp_size in deployment.spec.llm.valid_tp_sizes:
        other = replace(deployment, tp_size=tp_size)
        ways = [*_smaller_limits(other), *_smaller_precision(other)]
        if ways:
            return [f"TP={tp_size} {way}" for way in ways]
    return []


def smaller_limits(deployment: Deployment) -> Limits | None:
    """The first of ever smaller limits that fits, with as large a KV cache as there is room for."""
    for limits in _shrinking(deployment.limits, deployment.spec):
        memory = replace(deployment, limits=limits).memory()
        tokens = memory.kv_tokens_that_fit // BLOCK_TOKENS * BLOCK_TOKENS
        if tokens >= limits.max_seq_len:
            return replace(limits, max_kv_cache_tokens=min(tokens, limits.max_kv_cache_tokens))
    return None


def _shrinking(limits: Limits, spec: ModelSpec) -> Iterator[Limits]:
    """Fewer tokens in the KV cache, then fewer requests, then fewer tiles, then shorter ones."""
    picture = spec.max_tiles_with_thumbnail
    max_seq_len = limits.max_seq_len
    while True:
        for tiles in (limits.max_tiles_per_request, picture):
            max_batch_size = limits.max_batch_size
            while max_batch_size >= 1:
                yield replace(
                    limits,
                    max_seq_len=max_seq_len,
                    max_batch_size=max_batch_size,
                    max_tiles_per_request=tiles,
                    max_tiles_per_run=min(limits.max_tiles_per_run, max(tiles, picture)),
                )
                max_batch_size //= 2
        if max_seq_len // 2 < SHORTEST_SEQ_LEN:
            return
        max_seq_len //= 2


def _other_gpus(deployment: Deployment) -> list[str]:
    """Those with which everything else fits as it is, or else with another TP."""
    others = [replace(deployment, gpu=gpu) for gpu in GPUS.values()]
    names = [other.gpu.name for other in others if other.fits]
    if not names:
        sizes = ((other.gpu.name, smallest_tp_size(other)) for other in others)
        names = [f"{name} TP={tp_size}" for name, tp_size in sizes if tp_size is not None]
    return [f"GPU={' or '.join(names)}"] if names else []


def _way(change: str, deployment: Deployment) -> str:
    memory = deployment.memory()
    return f"{change} ({gib(memory.total_bytes)} of {gib(memory.available_bytes)})"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
