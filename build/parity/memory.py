"""How much memory a verification needs, and whether there is that much."""

from __future__ import annotations

import math
from pathlib import Path

from internvl_triton.artifacts import Profile
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import ModelSpec

__all__ = ["available_bytes", "check_memory", "needed_bytes"]

PROGRAMS_BYTES = 3 * 10**9 // 2  # Python, torch, the server's processes
PROMPT_TOKENS = 4096  # of the longest question: 13 tiles of 256 tokens and the text


def check_memory(spec: ModelSpec, profile: Profile, *, meminfo: Path | None = None) -> None:
    """Raise BuildFailed, with both numbers, when this machine has not enough free memory."""
    needed, available = needed_bytes(spec, profile), available_bytes(meminfo)
    if available is not None and available < needed:
        raise BuildFailed(
            f"verifying this model on the {profile} profile takes about {needed / 1e9:.0f} GB of "
            f"memory, and {available / 1e9:.0f} GB are available; end other programs, or use a "
            "machine with more memory"
        )


def needed_bytes(spec: ModelSpec, profile: Profile) -> int:
    """The larger of what the engines take and, after them, the reference.

    cpu: both engines hold float32 weights. gpu: theirs are on the GPUs. The reference holds its
    largest matrix as stored and as float32, and the scores of eager attention, twice.
    """
    sizes = [math.prod(shape) for shape in checkpoint_shapes(spec).values()]
    tiles, vision, llm = spec.max_tiles_with_thumbnail, spec.vision, spec.llm
    scores = max(
        tiles * vision.num_heads * vision.num_positions**2,
        llm.num_heads * PROMPT_TOKENS**2,
    )
    engines = 4 * sum(sizes) if profile == "cpu" else 0
    reference = 10 * max(sizes) + 2 * 4 * scores
    return PROGRAMS_BYTES + max(engines, reference)


def available_bytes(meminfo: Path | None = None) -> int | None:
    """Linux's MemAvailable, None where it is not to be had."""
    try:
        lines = (meminfo or Path("/proc/meminfo")).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
