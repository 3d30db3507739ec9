"""The GPUs of this machine and NVIDIA's compilers in this environment."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import dataclass

from build import pin
from internvl_triton.errors import BuildFailed

__all__ = ["Gpu", "Machine", "installed_version", "this_machine", "visible_gpus"]


@dataclass(frozen=True)
class Gpu:
    """compute_capability: such as "8.0" (A100), "8.9" (L40S), "9.0" (H100)."""

    index: str
    uuid: str
    name: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """Where engines are built or served. Versions are None when the package is not installed."""

    gpus: tuple[Gpu, ...]
    tensorrt: str | None
    tensorrt_llm: str | None


def this_machine() -> Machine:
    return Machine(
        gpus=tuple(visible_gpus()),
        tensorrt=installed_version("tensorrt"),
        tensorrt_llm=installed_version("tensorrt_llm"),
    )


def check_buildable(machine: Machine) -> None:
    """Raise BuildFailed unless engines that the pinned container serves can be built here."""
    problem = wrong_container(machine) or mixed_gpus(machine)
    if problem:
        raise BuildFailed(problem)


def wrong_container(machine: Machine) -> str | None:
    """Why this environment is not the pinned container, as one sentence, or None."""
    for package, found, wanted in (
        ("TensorRT-LLM", machine.tensorrt_llm, pin.TENSORRT_LLM),
        ("TensorRT", machine.tensorrt, pin.TENSORRT),
    ):
        if found is None or not (found == wanted or found.startswith(f"{wanted}.")):
            return (
                f"this environment has {package} {found or '(none)'}, and engines need {wanted}: "
                f"run `make engines` and `make serve` with docker, or inside {pin.IMAGE}"
            )
    return None


def mixed_gpus(machine: Machine) -> str | None:
    """Why the GPUs cannot share one engine, as one sentence, or None."""
    kinds = {gpu.compute_capability: gpu.name for gpu in machine.gpus}
    if len(kinds) == 1:
        return None
    found = ", ".join(f"{name} ({capability})" for capability, name in sorted(kinds.items()))
    return (
        f"the visible GPUs have different compute capabilities: {found or 'no GPU'}; an engine is "
        "compiled for one: choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
    )


def installed_version(package: str) -> str | None:
    """Without importing it: importing tensorrt_llm starts MPI."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that programs started here would see; [] without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    gpus = [Gpu(*row) for row in rows if len(row) == 4] if done.returncode == 0 else []
    return _selected(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _selected(gpus: list[Gpu], wanted: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names; as CUDA does it, nothing after an unknown entry."""
    if wanted is None:
        return gpus
    chosen = []
    for entry in wanted.split(","):
        name = entry.strip()
        found = [gpu for gpu in gpus if name and (gpu.index == name or gpu.uuid.startswith(name))]
        if not found:
            break
        chosen.append(found[0])
    return chosen
