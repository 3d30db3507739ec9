"""Which profile this machine gets: gpu where there is an NVIDIA GPU, else cpu."""

from __future__ import annotations

from build.machine import visible_gpus
from internvl_triton.artifacts import Profile
from internvl_triton.errors import BuildFailed

__all__ = ["PROFILES", "choose_profile"]

PROFILES: tuple[Profile, ...] = ("cpu", "gpu")


def choose_profile(wanted: str | None) -> Profile:
    """`wanted`, or gpu where there is a GPU, else cpu.

    Raises BuildFailed for an unknown profile, or for gpu on a machine without one.
    """
    if wanted is not None and wanted not in PROFILES:
        raise BuildFailed(f"PROFILE={wanted!r} is unknown; use one of {', '.join(PROFILES)}")
    if wanted != "cpu" and visible_gpus():
        return "gpu"
    if wanted == "gpu":
        raise BuildFailed(
            "PROFILE=gpu needs an NVIDIA GPU, and nvidia-smi lists none; use PROFILE=cpu"
        )
    return "cpu"
