"""Runs in the pinned container what NVIDIA's compilers and engines take part in: `make engines`,
`make serve`, the engines of `make verify` and their benchmark.

Docker builds its image from this project (`build/Dockerfile`); artefacts and checkpoint are mounted
where they are on the host, so a path means the same on both sides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from build import pin
from build.machine import installed_version
from build.model_source import artifact_name, is_known_name
from build.profile import choose_profile
from internvl_triton.errors import BuildFailed

__all__ = ["IMAGE_BUILT", "docker_run_command", "enter", "enter_container", "inside", "run"]

ROOT = Path(__file__).resolve().parent.parent
IMAGE_BUILT = f"internvl-triton:{pin.IMAGE.split(':')[1].split('-')[0]}"
SHARED_MEMORY = "8g"  # a limit, not an allocation: tensors between steps, NCCL between ranks
# Passed on when they are set here. Docker reads the values, so none is on a command line.
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)


def inside() -> bool:
    """Whether this environment is the pinned container, judged by its TensorRT-LLM.

    Raises BuildFailed in a container of another release.
    """
    found = installed_version("tensorrt_llm")
    if found not in (None, pin.TENSORRT_LLM):
        raise BuildFailed(
            f"this environment has TensorRT-LLM {found}, and engines need {pin.TENSORRT_LLM}: "
            f"leave it and run this on the host with docker, or use {pin.IMAGE}"
        )
    return found is not None


def enter_container(module: str, options: argparse.Namespace) -> None:
    """Decide options.profile; for the gpu profile become `module` in the pinned container.

    Comes back in the cpu profile, and inside that container.
    Raises BuildFailed: no such profile, or docker and its GPUs cannot be used.
    """
    options.profile = choose_profile(options.profile)
    if options.profile == "gpu" and not inside():
        enter(module, options)


def enter(module: str, options: argparse.Namespace) -> NoReturn:
    """Become `python3 -m module` with the same options in the container.

    options: of `module`'s command line; `model`, `artifacts` and `calibration` are made absolute.
    Raises UnknownModel; BuildFailed when docker, its daemon or its access to GPUs is missing.
    """
    command = _command(module, options)
    sys.stdout.flush()
    os.execvp(command[0], command)


def run(module: str, options: argparse.Namespace) -> None:
    """As `enter`, and come back when it has ended well. Raises BuildFailed if it has not."""
    command = _command(module, options)
    sys.stdout.flush()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise BuildFailed(f"{module} failed in the container with exit code {code}: see above")


def _command(module: str, options: argparse.Namespace) -> list[str]:
    artifact_name(options.model)
    checkpoint = None if is_known_name(options.model) else Path(options.model).resolve()
    artifacts = Path(options.artifacts).resolve()
    artifacts.mkdir(parents=True, exist_ok=True)
    given = {
        **vars(options),
        "model": checkpoint or options.model,
        "artifacts": artifacts,
    }
    readable = _folders_of(checkpoint) if checkpoint else []
    if given.get("calibration") is not None:
        given["calibration"] = Path(options.calibration).resolve()
        readable.append(given["calibration"])
    arguments = [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]
    _check_docker()
    _build_image()
    _check_gpus()
    return docker_run_command(
        ["python3", "-m", module, *arguments],
        writable=artifacts,
        readable=readable,
        terminal=sys.stdin.isatty() and sys.stdout.isatty(),
    )


def docker_run_command(
    command: Sequence[str], *, writable: Path, readable: Sequence[Path], terminal: bool
) -> list[str]:
    """`docker run` with all GPUs, the host's network and the caller's user.

    terminal: connect the caller's; otherwise docker passes signals on to the command.
    """
    mounts = [f"{writable}:{writable}", *(f"{folder}:{folder}:ro" for folder in readable)]
    # The user's name is looked up by MPI and by torch.
    mounts += ["/etc/passwd:/etc/passwd:ro", "/etc/group:/etc/group:ro"]
    return [
        *("docker", "run", "--rm", "--init", "--gpus=all", "--network=host"),
        *(f"--shm-size={SHARED_MEMORY}", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        *(f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/tmp"),
        *(f"--env={name}" for name in PASSED_ON),
        *(f"--volume={mount}" for mount in mounts),
        *(("--interactive", "--tty") if terminal else ()),
        IMAGE_BUILT,
        *command,
    ]


def _folders_of(checkpoint: Path) -> list[Path]:
    """The checkpoint's folder and those its links lead to, such as a download cache's blobs."""
    return sorted({checkpoint, *(file.resolve().parent for file in checkpoint.iterdir())})


def _check_docker() -> None:
    needed = f"PROFILE=gpu runs in NVIDIA's container {pin.IMAGE}"
    if shutil.which("docker") is None:
        raise BuildFailed(
            f"{needed}, and docker is not installed: install docker and the NVIDIA Container "
            "Toolkit, or run this inside that container, or use PROFILE=cpu"
        )
    answer = _captured(["docker", "version", "--format", "{{.Server.Version}}"])
    if answer.returncode:
        raise BuildFailed(
            f"{needed}, and docker's daemon does not answer ({_last_line(answer.stderr)}): start "
            "it, or let this user use it (group docker)"
        )


def _build_image() -> None:
    """Up to date in a second when nothing has changed; the first time it pulls the container."""
    print(f"container image {IMAGE_BUILT} ...", flush=True)
    dockerfile = ROOT / "build" / "Dockerfile"
    command = ["docker", "build", f"--tag={IMAGE_BUILT}", f"--file={dockerfile}", str(ROOT)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise BuildFailed(
            f"docker could not build the image from {dockerfile} (exit code {done.returncode}); "
            "its output above says why"
        )


def _check_gpus() -> None:
    command = ["docker", "run", "--rm", "--gpus=all", "--entrypoint=nvidia-smi", IMAGE_BUILT]
    answer = _captured([*command, "--list-gpus"])
    if answer.returncode == 0 and answer.stdout.strip():
        return
    reason = _last_line(answer.stderr) or "nvidia-smi lists none"
    raise BuildFailed(
        f"docker cannot give its containers the GPUs ({reason}): install the NVIDIA Container "
        "Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, and restart docker"
    )


def _captured(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()
