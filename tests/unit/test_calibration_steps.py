"""`make engines` with a calibrated PRECISION or KV_CACHE: its steps, commands, manifest, configs.

The GPUs, trtllm-build and TensorRT are stand-ins; so are the two programs of the calibration, whose
own tests are in `test_calibration.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from build import container, make_server
from build.calibration import steps as calibration
from build.engines import build_engines
from build.engines import main as engines_main
from build.gpu_servable import check_gpu_servable
from build.machine import Machine, this_machine
from build.servable import built_llms
from export import checkpoint_config, export_llm
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import ArtifactMismatch, BuildFailed
from internvl_triton.model_spec import ModelSpec
from tests.unit.test_gpu_serving_checks import set_up_machine

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: see `make test-env`")
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")

LLM = LLMBuild("int8_sq", 1, "int8")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    set_up_machine(tmp_path / "machine", monkeypatch)
    return this_machine()


@pytest.fixture
def source(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints["internlm2"], tmp_path / "tiny")


@pytest.fixture
def commands(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the calibration runs; in its place, the plain tensors with the calibrated config."""
    seen: list[list[str]] = []

    def run(name: str, command: list[str], log_path: Path) -> None:
        seen.append(command)
        options = dict(part.removeprefix("--").split("=", 1) for part in command[3:])
        log_path.write_text("")
        if name != "calibration":
            Path(options["output"]).mkdir()
            return
        assert (Path(options["source"]) / "config.json").is_file()
        assert Path(options["inputs"]).is_dir()
        output = export_llm(source, Path(options["output"]), tp_size=1, progress=False)
        config = checkpoint_config(
            ModelSpec.from_checkpoint(source),
            tp_size=1,
            precision=options["precision"],
            kv_cache=options.get("kv-cache"),
        )
        (output / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(calibration, "run_logged", run)
    return seen


def build(source: Path, tmp_path: Path, **options) -> Artifacts:
    return build_engines(
        str(source),
        profile="gpu",
        artifacts_dir=tmp_path / "artifacts",
        limits={"max_batch_size": 2, "max_seq_len": 8192, "max_tiles_per_request": 14},
        progress=False,
        **options,
    )


def test_from_checkpoint_to_a_repository_that_can_be_served(
    source: Path, machine: Machine, commands: list[list[str]], tmp_path: Path, capsys
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"not read here")
    options = {"precision": "int8_sq", "kv_cache": "int8", "calibration": pictures}
    artifacts = build(source, tmp_path, **options)
    root = artifacts.root
    folder = root / "llm" / "int8_sq-kv_int8-tp1"
    assert [command[1:] for command in commands] == [
        [
            *("-m", "build.calibration.inputs", f"--artifacts={root}"),
            *(f"--output={folder}/calibration_inputs", "--limit=512", f"--samples={pictures}"),
        ],
        [
            *("-m", "build.calibration.quantize", f"--source={root}/llm/for_modelopt"),
            *(f"--inputs={folder}/calibration_inputs", f"--spec={root}/tokenizer"),
            *(f"--output={folder}/checkpoint", "--precision=int8_sq", "--tp-size=1"),
            "--kv-cache=int8",
        ],
    ]
    assert not (folder / "calibration_inputs").exists()
    manifest = artifacts.manifest()
    assert list(manifest.steps) == [
        *("tokenizer", "vision", "vision plan", "language model for ModelOpt"),
        *("llm int8_sq-kv_int8-tp1", "engine int8_sq-kv_int8-tp1", "repository"),
    ]
    assert manifest.steps[LLM.step]["calibrated with"] == "pictures"
    assert built_llms(artifacts) == [LLM]

    engine = json.loads((artifacts.llm_engine(LLM) / "config.json").read_text())
    assert engine["pretrained_config"]["quantization"]["kv_cache_quant_algo"] == "INT8"
    assert engine["build_config"]["plugin_config"]["use_paged_context_fmha"] is False
    check_gpu_servable(artifacts, LLM, machine)
    with pytest.raises(ArtifactMismatch, match=r"no finished step 'llm int8_sq-tp1'"):
        check_gpu_servable(artifacts, LLMBuild("int8_sq", 1), machine)
    make_server(
        str(source),
        profile="gpu",
        precision="int8_sq",
        kv_cache="int8",
        artifacts_dir=tmp_path / "artifacts",
    )
    text = (artifacts.repository / "tensorrt_llm" / "config.pbtxt").read_text()
    reuse = text[text.index("enable_kv_cache_reuse") :]
    assert reuse[: reuse.index("}")].count('"false"') == 1

    capsys.readouterr()
    build(source, tmp_path, **options)
    assert capsys.readouterr().out.count("up to date") == 7
    (pictures / "b.png").write_bytes(b"another picture")
    build(source, tmp_path, **options)
    assert len(commands) == 4


def test_awq_takes_fewer_samples_and_the_built_in_ones_by_default(
    source: Path, machine: Machine, commands: list[list[str]], tmp_path: Path
) -> None:
    artifacts = build(source, tmp_path, precision="int4_awq")
    assert commands[0][-1] == "--limit=32"
    manifest = artifacts.manifest()
    assert manifest.steps["llm int4_awq-tp1"]["calibrated with"] == "built-in samples"


def test_what_an_a100_has_not_is_refused_before_anything_is_built(
    source: Path, machine: Machine, commands: list[list[str]], tmp_path: Path
) -> None:
    for options, message in (
        ({"precision": "fp8"}, r"PRECISION=fp8 .*NVIDIA A100.* use PRECISION=bf16, fp16, int8"),
        ({"kv_cache": "fp8"}, r"KV_CACHE=fp8 .* use KV_CACHE=int8 or no KV_CACHE"),
    ):
        with pytest.raises(BuildFailed, match=message):
            build(source, tmp_path, **options)
    assert commands == []
    assert not (tmp_path / "artifacts" / "tiny").exists()


def test_the_cpu_profile_refuses_with_what_it_has(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--model={source}", "--profile=cpu", f"--artifacts={tmp_path / 'artifacts'}"]
    for option, name in (
        ("--precision=fp8", "PRECISION=fp8"),
        ("--kv-cache=int8", "KV_CACHE=int8"),
    ):
        assert engines_main([*arguments, option]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {name} is calibrated and executed by NVIDIA's programs")
        assert (
            "use PROFILE=gpu. PROFILE=cpu has PRECISION=bf16, fp16, fp32, int8 or int4" in printed
        )


@pytest.mark.parametrize(
    "build_of", [LLMBuild("bf16", 2), LLMBuild("int4_awq", 8), LLMBuild("fp8", 4, "fp8"), LLM]
)
def test_names_of_builds_can_be_read_back(build_of: LLMBuild) -> None:
    assert LLMBuild.from_name(build_of.name) == build_of


def test_the_container_sees_the_calibration_set(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    for check in ("_check_docker", "_build_image", "_check_gpus"):
        monkeypatch.setattr(container, check, lambda: None)
    started: list[list[str]] = []
    monkeypatch.setattr(container.os, "execvp", lambda _, command: started.append(command))
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(
        model=str(source), artifacts=Path("artifacts"), calibration=Path("set"), precision="fp8"
    )
    container.enter("build.engines", options)
    folder = tmp_path / "set"
    assert f"--volume={folder}:{folder}:ro" in started[0]
    assert f"--calibration={folder}" in started[0]
