"""`make engines PROFILE=gpu` step by step, and everything that server start refuses.

The GPUs, TensorRT-LLM's compiler and the container are stand-ins (`gpu_fakes`); the vision graph
is compiled by TensorRT for RTX.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from build import make_server, pin
from build.engines import build_engines
from build.gpu_servable import check_gpu_servable
from build.machine import Machine, this_machine
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import ArtifactMismatch, BuildFailed, EngineBuildFailed
from internvl_triton.gpu_triton_server import GpuTritonServer
from tests.unit.gpu_fakes import (
    NVIDIA_SMI,
    TRTLLM_BUILD,
    fake_tensorrt,
    write_package,
    write_program,
)

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: see `make test-env`")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning"  # its timing cache holds nothing
)

LLM = LLMBuild("bf16", 2)
COMPILED = ["vision plan", "engine bf16-tp2"]
ALL = ["tokenizer", "vision", "llm bf16-tp2", *COMPILED, "repository"]


def set_up_machine(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The inside of the pinned container on a machine with two GPUs."""
    write_program(folder / "bin", "nvidia-smi", NVIDIA_SMI)
    write_program(folder / "bin", "trtllm-build", TRTLLM_BUILD)
    write_package(folder / "packages", "tensorrt_llm", pin.TENSORRT_LLM)
    write_package(folder / "packages", "tensorrt", f"{pin.TENSORRT}.0.33")
    patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    patch.syspath_prepend(folder / "packages")
    patch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    set_up_machine(tmp_path / "machine", monkeypatch)
    return this_machine()


@pytest.fixture(scope="module")
def built_once(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        set_up_machine(folder / "machine", patch)
        return build(checkpoints["qwen2"], folder / "artifacts")


@pytest.fixture
def built(built_once: Artifacts, tmp_path: Path) -> Artifacts:
    """A copy of its own of everything that was built."""
    return Artifacts(shutil.copytree(built_once.root, tmp_path / "artifacts" / built_once.name))


def build(checkpoint: Path, artifacts: Path, **options: Any) -> Artifacts:
    values = {"tp_size": 2, "profile": "gpu", "progress": False, **options}
    return build_engines(str(checkpoint), artifacts_dir=artifacts, **values)


def steps_run(output: str) -> list[str]:
    titles = [
        line for line in output.splitlines() if line.startswith("[") and line.endswith(" ...")
    ]
    return [title.split("] ")[1].removesuffix(" ...") for title in titles]


def rebuild(built: Artifacts, checkpoints: dict[str, Path], **options: Any) -> Artifacts:
    return build(checkpoints["qwen2"], built.root.parent, **options)


def test_everything_is_built_and_can_be_served(built: Artifacts, machine: Machine) -> None:
    manifest = built.manifest()
    assert list(manifest.steps) == ALL
    for step in COMPILED:
        assert manifest.steps[step]["TensorRT"] == "10.11.0.33"
        assert manifest.steps[step]["TensorRT-LLM"] == "0.21.0"
        assert manifest.steps[step]["compute capability"] == "8.0"
    assert manifest.steps["vision plan"]["max tiles"] == "26"
    assert manifest.versions["tensorrt_llm"] == "0.21.0"
    assert built.vision_plan.stat().st_size > 10_000
    names = {path.name for path in built.vision_dir.iterdir()}
    assert "timing-10.11.0.33-NVIDIA-A100-SXM4-80GB.cache" in names
    assert (built.llm_engine(LLM) / "rank1.engine").is_file()
    check_gpu_servable(built, LLM, machine)


@pytest.mark.usefixtures("machine")
def test_only_what_is_out_of_date_is_compiled(
    built: Artifacts, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    rebuild(built, checkpoints)
    assert steps_run(capsys.readouterr().out) == []
    rebuild(built, checkpoints, limits={"max_batch_size": 4})
    assert steps_run(capsys.readouterr().out) == ["engine bf16-tp2", "repository"]
    limits = {"max_batch_size": 4, "max_tiles_per_run": 13}
    rebuild(built, checkpoints, limits=limits)
    assert steps_run(capsys.readouterr().out) == ["vision plan", "repository"]
    limits["max_kv_cache_tokens"] = 40_000
    rebuild(built, checkpoints, limits=limits)
    assert steps_run(capsys.readouterr().out) == ["repository"]
    monkeypatch.setenv("FAKE_CAPABILITIES", "9.0")  # the disk moved into another machine
    rebuild(built, checkpoints, limits=limits)
    assert steps_run(capsys.readouterr().out) == COMPILED
    rebuild(built, checkpoints, limits=limits, profile="cpu")
    assert steps_run(capsys.readouterr().out) == ["repository"]


@pytest.mark.usefixtures("machine")
def test_a_failed_compilation_can_not_be_served(
    built: Artifacts, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRTLLM_BUILD", "fail")
    limits = {"max_batch_size": 4}
    with pytest.raises(EngineBuildFailed, match="RuntimeError: CUDA out of memory"):
        rebuild(built, checkpoints, limits=limits)
    assert not built.llm_engine(LLM).exists()
    with pytest.raises(ArtifactMismatch, match=r"no finished step 'engine bf16-tp2'.*PROFILE=gpu"):
        check_gpu_servable(built, LLM, this_machine())
    monkeypatch.setenv("FAKE_TRTLLM_BUILD", "")
    check_gpu_servable(rebuild(built, checkpoints, limits=limits), LLM, this_machine())


def test_gpu_builds_need_the_container_and_one_kind_of_gpu(
    machine: Machine, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = tmp_path / "artifacts"
    with pytest.raises(
        BuildFailed, match=r"gpu profile cannot use precision 'fp32' .*; use PRECISION=bf16 or fp16"
    ):
        build(checkpoints["qwen2"], artifacts, precision="fp32")
    monkeypatch.setenv("FAKE_CAPABILITIES", "8.0 8.9")
    with pytest.raises(BuildFailed, match=r"A100.* \(8\.0\).* \(8\.9\).*CUDA_VISIBLE_DEVICES"):
        build(checkpoints["qwen2"], artifacts)
    shutil.rmtree(tmp_path / "machine" / "packages")
    with pytest.raises(BuildFailed, match=r"has TensorRT-LLM \(none\), and engines need 0\.21\.0"):
        build(checkpoints["qwen2"], artifacts)


def other_version(artifacts: Artifacts, machine: Machine) -> Machine:
    return replace(machine, tensorrt_llm="1.0.0")


def other_tensorrt(artifacts: Artifacts, machine: Machine) -> Machine:
    return replace(machine, tensorrt="10.14.1.48")


def other_patch_of_tensorrt(artifacts: Artifacts, machine: Machine) -> Machine:
    return replace(machine, tensorrt="10.11.1.2")


def other_gpus(artifacts: Artifacts, machine: Machine) -> Machine:
    gpus = tuple(replace(gpu, compute_capability="9.0") for gpu in machine.gpus)
    return replace(machine, gpus=gpus)


def one_gpu(artifacts: Artifacts, machine: Machine) -> Machine:
    return replace(machine, gpus=machine.gpus[:1])


def no_gpu(artifacts: Artifacts, machine: Machine) -> Machine:
    return replace(machine, gpus=())


def limit(**limits: int):
    def change(artifacts: Artifacts, machine: Machine) -> Machine:
        manifest = artifacts.manifest()
        manifest.limits |= limits
        artifacts.write_manifest(manifest)
        return machine

    return change


def engine(section: str, **values: Any):
    def change(artifacts: Artifacts, machine: Machine) -> Machine:
        path = artifacts.llm_engine(LLM) / "config.json"
        config = json.loads(path.read_text())
        config[section].update(values)
        path.write_text(json.dumps(config))
        return machine

    return change


def engine_of_another_checkpoint(artifacts: Artifacts, machine: Machine) -> Machine:
    manifest = artifacts.manifest()
    manifest.steps["engine bf16-tp2"]["checkpoint_sha256"] = "0123456789abcdef"
    artifacts.write_manifest(manifest)
    return machine


def no_vision_plan(artifacts: Artifacts, machine: Machine) -> Machine:
    artifacts.vision_plan.unlink()
    return machine


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_version, r"has TensorRT-LLM 1\.0\.0, and engines need 0\.21\.0: .*inside nvcr"),
        (other_tensorrt, r"has TensorRT 10\.14\.1\.48, and engines need 10\.11"),
        (
            other_patch_of_tensorrt,
            r"'vision plan' was built with TensorRT 10\.11\.0\.33, and .*1\.2",
        ),
        (other_gpus, r"'vision plan' was built with compute capability 8\.0, and .* has 9\.0"),
        (one_gpu, r"TP=2 needs 2 GPUs, and 1 can be seen here"),
        (no_gpu, r"no GPU"),
        (limit(max_tiles_per_run=39), r"built for 26 tiles a run, and the limits say 39"),
        (limit(max_tiles_per_request=128), r"per request 16384, and at least 32768 is needed"),
        (limit(max_batch_size=9), r"max_batch_size 8, and 9 is needed"),
        (limit(max_seq_len=16384), r"max_seq_len 32768, and 16384 is needed"),
        (engine("pretrained_config", vocab_size=92553), r"vocab_size 92553, and 1283 is needed"),
        (engine("pretrained_config", mapping={"tp_size": 4}), r"tp_size 4, and 2 is needed"),
        (engine_of_another_checkpoint, r"'engine bf16-tp2' .* another checkpoint \(0123456789ab"),
        (no_vision_plan, r"vision_encoder\.plan is missing"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_sentence(
    built: Artifacts, machine: Machine, change, sentence: str
) -> None:
    machine = change(built, machine)
    with pytest.raises(ArtifactMismatch, match=sentence) as refused:
        check_gpu_servable(built, LLM, machine)
    assert "\n" not in str(refused.value)
    assert "make " in str(refused.value) or "CUDA_VISIBLE_DEVICES" in str(refused.value)


@pytest.mark.usefixtures("machine")
def test_make_server_serves_the_engines(built: Artifacts, checkpoints: dict[str, Path]) -> None:
    server = make_server(
        str(checkpoints["qwen2"]), tp_size=2, profile="gpu", artifacts_dir=built.root.parent
    )
    assert isinstance(server, GpuTritonServer)
    assert (server.num_ranks, server.cuda_memory_pool_bytes) == (2, 64 * 2**20)
    config = (built.repository / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"' in config
    assert str(built.llm_engine(LLM).resolve()) in config
