"""The plan as data: what the terminal shows as tables and `--json` prints.

A section is a list of rows; a key ends in its unit, or its value is a number or a text.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from build.planner.build_flags import build_flags
from build.planner.deployment import Deployment
from build.planner.speed import full_batch_size, load_section, shares_section, single_section
from build.planner.ways_out import smallest_tp_size, what_would_fit
from build.planner.weights import parameter_counts
from build.planner.workload import Workload

__all__ = ["plan"]

Section = list[dict[str, Any]]


def plan(deployment: Deployment, workload: Workload) -> dict[str, Any]:
    """Sections by name, a verdict, and what would fit if it does not: then without speeds."""
    memory = deployment.memory()
    batch_size = full_batch_size(deployment, workload)
    counts = parameter_counts(deployment.spec)
    report: dict[str, Any] = {
        "fits": memory.fits,
        "smallest_tp_size": smallest_tp_size(deployment),
        "would_fit": [] if memory.fits else what_would_fit(deployment),
        "parameters": [{"part": part, "parameters": count} for part, count in counts.items()],
        "memory of one GPU": _memory(deployment),
        "KV cache": _kv_cache(deployment, workload, batch_size),
    }
    if memory.fits:
        flags = build_flags(deployment)
        report |= {
            "trtllm-build flags": [{"flag": flag, "value": flags[flag]} for flag in flags],
            "one request, no other": single_section(deployment, workload),
            "load": load_section(deployment, workload, batch_size),
            f"shares at batch {batch_size}": shares_section(deployment, workload, batch_size),
        }
    return report


def _memory(deployment: Deployment) -> Section:
    memory = deployment.memory()
    rows = [
        {"part": name.removesuffix("_bytes").replace("_", " "), "size_bytes": size}
        for name, size in asdict(memory.parts).items()
    ]
    free = memory.available_bytes - memory.total_bytes
    return [
        *rows,
        {"part": f"KV cache, {memory.kv_tokens} tokens", "size_bytes": memory.kv_cache_bytes},
        {"part": "total", "size_bytes": memory.total_bytes},
        {"part": f"{deployment.gpu.name} has", "size_bytes": memory.available_bytes},
        {"part": "free" if free >= 0 else "missing", "size_bytes": abs(free)},
    ]


def _kv_cache(deployment: Deployment, workload: Workload, batch_size: int) -> Section:
    memory, limits = deployment.memory(), deployment.limits
    tokens = workload.total_tokens(deployment.spec)
    fitting = memory.kv_tokens_that_fit
    return [
        {"what": "bytes per token on one GPU", "number": memory.kv_bytes_per_token},
        {"what": "tokens of the limits", "number": limits.kv_cache_tokens},
        {"what": "tokens that would fit", "number": fitting},
        {"what": "tokens of one such request", "number": tokens},
        {"what": "requests at once within the limits", "number": batch_size},
        {"what": "such requests that would fit", "number": fitting // tokens},
        {"what": "requests of max_seq_len that would fit", "number": fitting // limits.max_seq_len},
    ]
