"""Which profile this machine gets: gpu where there is an NVIDIA GPU, else cpu."""

from __future__ import annotations

import shutil
import subprocess

from internvl_triton.errors import BuildFailed

__all__ = ["PROFILES", "choose_profile", "gpu_names"]

PROFILES = ("cpu", "gpu")


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that nvidia-smi lists; [] without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if not done.returncode
        else []
    )


def choose_profile(wanted: str | None) -> str:
    """`wanted`, or gpu where there is a GPU, else cpu.

    Raises BuildFailed for an unknown profile, or for gpu on a machine without one.
    """
    if wanted is not None and wanted not in PROFILES:
        raise BuildFailed(f"PROFILE={wanted!r} is unknown; use one of {', '.join(PROFILES)}")
    gpus = gpu_names()
    profile = wanted or ("gpu" if gpus else "cpu")
    if profile == "gpu" and not gpus:
        raise BuildFailed(
            "PROFILE=gpu needs an NVIDIA GPU, and nvidia-smi lists none; use PROFILE=cpu"
        )
    return profile
