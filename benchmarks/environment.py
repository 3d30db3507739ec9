"""On what and with what a benchmark ran: a number without it means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["DISTURBED", "describe_environment"]

DISTURBED = "disturbed by"

_PACKAGES = ("internvl-triton", "numpy", "onnxruntime", "nvidia-pytriton", "tritonclient", "pillow")
_ROOT = Path(__file__).resolve().parent.parent


def describe_environment() -> dict[str, str]:
    """What it is -> its text: command, commit, processor, memory, load, GPUs, versions."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    found = {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}",
        "commit": _commit(),
        "processor": f"{_processor()}, {cores} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "load before": f"{load:.1f} (1 minute)",
        "GPUs": _gpus(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    if load > 0.25 * cores:
        found[DISTURBED] = f"a load of {load:.1f} on {cores} cores, before anything was measured"
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "versions": ", ".join(versions)}


def _commit() -> str:
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> str:
    query = "--query-gpu=name,memory.total,driver_version"
    return "; ".join(_output("nvidia-smi", query, "--format=csv,noheader").splitlines()) or "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
