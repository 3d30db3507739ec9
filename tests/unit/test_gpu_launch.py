"""How the gpu profile is started: tritonserver or its ranks, and docker around everything."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from build import container, pin
from build.machine import visible_gpus
from build.profile import choose_profile
from internvl_triton.errors import BuildFailed, ServerStartFailed
from internvl_triton.gpu_triton_server import (
    GpuTritonServer,
    ServerOptions,
    launch_command,
    launch_environment,
)
from internvl_triton.triton_server import find_free_port
from tests.unit.gpu_fakes import DOCKER, NVIDIA_SMI, write_package, write_program

ROOT = Path(__file__).parents[2]
OPTIONS = ServerOptions(
    model_repository=Path("/artifacts/x/repository"),
    host="127.0.0.1",
    http_port=8000,
    grpc_port=8001,
    metrics_port=8002,
    exit_timeout_s=10,
    shared_memory_prefix="internvl_1_ab_",
    control_token="secret",
    cuda_memory_pool_bytes=300_000_000,
)
SERVER = (
    "/opt/tritonserver/bin/tritonserver"
    " --model-repository=/artifacts/x/repository --exit-timeout-secs=10"
)
RANK_0 = (
    f"{SERVER} --http-address=127.0.0.1 --http-port=8000 --grpc-address=127.0.0.1"
    " --grpc-port=8001 --metrics-address=127.0.0.1 --metrics-port=8002"
    " --cuda-memory-pool-byte-size=0:300000000 --model-control-mode=explicit --load-model=*"
    " --http-restricted-api=model-repository:launcher-token=secret"
    " --grpc-restricted-protocol=model-repository:launcher-token=secret"
    " --disable-auto-complete-config"
    " --backend-config=python,shm-region-prefix-name=internvl_1_ab_rank0_"
)


def other_rank(rank: int) -> str:
    return (
        f"{SERVER} --model-control-mode=explicit --load-model=tensorrt_llm"
        " --disable-auto-complete-config"
        f" --backend-config=python,shm-region-prefix-name=internvl_1_ab_rank{rank}_"
    )


def test_one_rank_is_tritonserver_itself() -> None:
    assert launch_command(OPTIONS, num_ranks=1) == shlex.split(RANK_0)


def test_more_ranks_run_under_mpirun() -> None:
    """As NVIDIA's launch_triton_server.py puts them together: `-n 1 SERVER : -n 1 SERVER`."""
    expected = f"mpirun --allow-run-as-root -n 1 {RANK_0} : -n 1 {other_rank(1)}"
    assert launch_command(OPTIONS, num_ranks=2) == shlex.split(expected)
    four = " ".join(launch_command(OPTIONS, num_ranks=4)).split(" : ")
    assert four[1:] == [f"-n 1 {other_rank(rank)}" for rank in (1, 2, 3)]


def test_mpirun_lets_requests_end() -> None:
    environment = launch_environment({"PATH": "/bin"}, exit_timeout_s=10)
    assert environment == {
        "PATH": "/bin",
        "PMIX_MCA_gds": "hash",
        "OMPI_MCA_odls_base_sigkill_timeout": "15",
    }


# Answers like a server that is ready, and leaves its arguments beside itself.
FAKE_SERVER = """
import http.server, pathlib, sys
arguments = sys.argv[1:]
pathlib.Path(__file__).with_name("arguments").write_text("\\n".join(arguments))
port = next(int(a.split("=")[1]) for a in arguments if a.startswith("--http-port="))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_server_starts_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    program = write_program(tmp_path / "bin", "tritonserver", FAKE_SERVER)
    write_program(tmp_path / "bin", "mpirun", FAKE_SERVER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    server = GpuTritonServer(
        tmp_path,
        num_ranks=num_ranks,
        cuda_memory_pool_bytes=2**26,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
        host="127.0.0.1",
        log_path=tmp_path / "log",
        exit_timeout_s=1,
        program=program,
    )
    with server:
        server.wait_ready(30)
        arguments = (tmp_path / "bin" / "arguments").read_text().splitlines()
        assert f"--model-repository={tmp_path}" in arguments
        assert ("--allow-run-as-root" in arguments) == (num_ranks > 1)
    assert server.exit_code is not None
    assert not server.is_running()


def test_outside_the_container_the_server_says_so(tmp_path: Path) -> None:
    server = GpuTritonServer(
        tmp_path,
        num_ranks=1,
        cuda_memory_pool_bytes=0,
        http_port=1,
        grpc_port=2,
        metrics_port=3,
        host="127.0.0.1",
        program=tmp_path / "absent",
    )
    with pytest.raises(ServerStartFailed, match="absent is missing, which is part of NVIDIA's"):
        server.start()


@pytest.fixture
def gpu_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with two GPUs and docker, both fake. Returns the folder of its programs."""
    programs = tmp_path / "bin"
    write_program(programs, "nvidia-smi", NVIDIA_SMI)
    write_program(programs, "docker", DOCKER)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("FAKE_DOCKER_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return programs


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


def test_a_gpu_is_used_unless_told_otherwise(
    gpu_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [gpu.compute_capability for gpu in visible_gpus()] == ["8.0", "8.0"]
    assert choose_profile(None) == choose_profile("gpu") == "gpu"
    assert choose_profile("cpu") == "cpu"
    for count in ("0", "-1"):  # no GPU; no driver that answers
        monkeypatch.setenv("FAKE_GPUS", count)
        assert choose_profile(None) == "cpu"
        with pytest.raises(BuildFailed, match="nvidia-smi lists none; use PROFILE=cpu"):
            choose_profile("gpu")
    with pytest.raises(BuildFailed, match="PROFILE='tpu' is unknown; use one of cpu, gpu"):
        choose_profile("tpu")


@pytest.mark.parametrize(
    ("value", "indices"),
    [("", ""), ("-1", ""), ("1", "1"), ("1,0", "10"), ("GPU-0", "0"), ("0,7,1", "0")],
)
def test_hidden_gpus_do_not_count(
    gpu_host: Path, monkeypatch: pytest.MonkeyPatch, value: str, indices: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "".join(gpu.index for gpu in visible_gpus()) == indices


def test_the_container_is_known_by_its_tensorrt_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not container.inside()
    write_package(tmp_path / "new", "tensorrt_llm", "1.2.1")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "new")
        with pytest.raises(BuildFailed, match=r"has TensorRT-LLM 1\.2\.1, and engines need 0\.21"):
            container.inside()
    write_package(tmp_path / "pinned", "tensorrt_llm", pin.TENSORRT_LLM)
    monkeypatch.syspath_prepend(tmp_path / "pinned")
    assert container.inside()


def test_make_engines_runs_itself_in_the_container(
    gpu_host: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    checkpoint, artifacts = checkpoints["qwen2"], tmp_path / "artifacts"
    done = run(
        *("build.engines", f"--model={checkpoint}", "--tp-size=2", "--max-batch-size=4"),
        f"--artifacts={artifacts}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "in the container"
    version, build, probe, command = calls(tmp_path)
    assert version[0] == "version"
    dockerfile = ROOT / "build" / "Dockerfile"
    assert build == ["build", "--tag=internvl-triton:25.08", f"--file={dockerfile}", str(ROOT)]
    assert probe[-2:] == ["internvl-triton:25.08", "--list-gpus"]
    image = command.index("internvl-triton:25.08")
    assert command[image + 1 :] == [
        *("python3", "-m", "build.engines", f"--model={checkpoint}", "--tp-size=2"),
        *("--profile=gpu", f"--artifacts={artifacts}", "--max-batch-size=4"),
    ]
    options = command[:image]
    assert options[0] == "run"
    assert {"--rm", "--gpus=all", "--network=host", "--ulimit=memlock=-1"} <= set(options)
    assert f"--user={os.getuid()}:{os.getgid()}" in options
    assert f"--volume={artifacts}:{artifacts}" in options
    assert f"--volume={checkpoint}:{checkpoint}:ro" in options
    assert "--tty" not in options  # stdin is no terminal: docker passes signals on
    assert artifacts.is_dir()  # made by the user, not by docker's daemon


def test_make_serve_runs_itself_in_the_container(
    gpu_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT_CODE", "3")
    done = run("build.serve", "--http-port=9000", f"--artifacts={tmp_path / 'artifacts'}")
    assert done.returncode == 3  # that of the command in the container
    command = calls(tmp_path)[-1]
    inside = command[command.index("internvl-triton:25.08") + 1 :]
    assert inside[:5] == ["python3", "-m", "build.serve", "--model=demo", "--tp-size=1"]
    assert {"--profile=gpu", "--host=127.0.0.1", "--http-port=9000"} <= set(inside)


def test_a_checkpoint_of_links_is_mounted_with_what_they_lead_to(
    gpu_host: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in checkpoints["qwen2"].iterdir():
        (linked / file.name).symlink_to(file)
    done = run("build.engines", f"--model={linked}", f"--artifacts={tmp_path / 'artifacts'}")
    assert done.returncode == 0, done.stderr
    mounted = {option for option in calls(tmp_path)[-1] if option.endswith(":ro")}
    for folder in (linked, checkpoints["qwen2"]):
        assert f"--volume={folder}:{folder}:ro" in mounted


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no daemon", "docker's daemon does not answer (Cannot connect to the Docker daemon"),
        ("no build", "docker could not build the image"),
        ("no gpus", "docker cannot give its containers the GPUs (docker: could not select device"),
    ],
)
def test_what_docker_lacks_is_said(
    gpu_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_DOCKER", mode)
    done = run("build.engines", f"--artifacts={tmp_path / 'artifacts'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_gpu_host_without_docker_is_told_what_to_do(gpu_host: Path, tmp_path: Path) -> None:
    (gpu_host / "docker").unlink()
    for module in ("build.engines", "build.serve"):
        done = run(module, f"--artifacts={tmp_path / 'artifacts'}")
        assert done.returncode == 1
        assert "docker is not installed: install docker and the NVIDIA Container" in done.stderr
        assert "or use PROFILE=cpu" in done.stderr


def test_an_unknown_model_needs_no_container(gpu_host: Path, tmp_path: Path) -> None:
    done = run("build.engines", "--model=InternVL9", f"--artifacts={tmp_path / 'artifacts'}")
    assert done.returncode == 1
    assert "neither a directory nor a known name" in done.stderr
    assert not (tmp_path / "calls").exists()
