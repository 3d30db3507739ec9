"""What `make engines` runs again, what it skips, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from build.engines import build_engines
from build.servable import built_llms, check_servable
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import (
    ArtifactMismatch,
    BuildFailed,
    IncompleteCheckpoint,
    InvalidTensorParallel,
)

ALL = ("tokenizer", "vision", "llm bf16-tp1", "repository")


@pytest.fixture
def source(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints["qwen2"], tmp_path / "tiny")


def build(source: Path, tmp_path: Path, **options) -> Artifacts:
    return build_engines(
        str(source), profile="cpu", artifacts_dir=tmp_path / "artifacts", progress=False, **options
    )


def steps_run(output: str) -> list[str]:
    return [
        line.split("] ")[1].removesuffix(" ...")
        for line in output.splitlines()
        if line.endswith(" ...") and "] " in line
    ]


def test_only_what_is_out_of_date_is_done(source: Path, tmp_path: Path, capsys) -> None:
    build(source, tmp_path)
    assert steps_run(capsys.readouterr().out) == list(ALL)
    build(source, tmp_path)
    output = capsys.readouterr().out
    assert steps_run(output) == []
    assert output.count("up to date") == 4

    build(source, tmp_path, tp_size=2)
    assert steps_run(capsys.readouterr().out) == ["llm bf16-tp2", "repository"]
    build(source, tmp_path, limits={"max_seq_len": 4096})
    assert steps_run(capsys.readouterr().out) == ["repository"]

    artifacts = Artifacts(tmp_path / "artifacts" / "tiny")
    artifacts.vision_onnx.unlink()
    build(source, tmp_path, limits={"max_seq_len": 4096})
    assert steps_run(capsys.readouterr().out) == ["vision"]

    os.utime(source / "model.safetensors")  # same bytes, new time
    build(source, tmp_path, limits={"max_seq_len": 4096})
    assert steps_run(capsys.readouterr().out) == []


def test_other_weights_make_everything_out_of_date(source: Path, tmp_path: Path, capsys) -> None:
    build(source, tmp_path, tp_size=2)
    build(source, tmp_path)
    capsys.readouterr()
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x12\x3f")
    artifacts = build(source, tmp_path)
    assert steps_run(capsys.readouterr().out) == list(ALL)
    check_servable(artifacts, LLMBuild("bf16", 1))
    with pytest.raises(ArtifactMismatch, match=r"'llm bf16-tp2' .*another checkpoint.*TP=2"):
        check_servable(artifacts, LLMBuild("bf16", 2))


def test_the_manifest_says_what_was_built_from_what(source: Path, tmp_path: Path) -> None:
    artifacts = build(source, tmp_path)
    manifest = artifacts.manifest()
    assert manifest.model == "tiny"
    assert set(manifest.steps) == set(ALL)
    assert manifest.limits["max_seq_len"] == 32768
    assert "onnxruntime" in manifest.versions
    assert set(manifest.checkpoint_files) >= {"config.json", "model.safetensors"}
    assert built_llms(artifacts) == [LLMBuild("bf16", 1)]
    # No path of this machine goes into what is copied to another one.
    assert str(tmp_path) not in artifacts.manifest_path.read_text()


def test_a_failing_step_is_not_called_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export.llm_checkpoint

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export.llm_checkpoint, "export_llm", fails)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path)
    artifacts = Artifacts(tmp_path / "artifacts" / "tiny")
    assert set(artifacts.manifest().steps) == {"tokenizer", "vision"}
    with pytest.raises(ArtifactMismatch, match=r"no finished step 'llm bf16-tp1'.*make engines"):
        check_servable(artifacts, LLMBuild("bf16", 1))
    check_servable(build(source, tmp_path), LLMBuild("bf16", 1))


def test_bad_checkpoints_leave_no_step(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidTensorParallel, match="use TP = 1, 2, 4"):
        build(source, tmp_path, tp_size=8)
    with pytest.raises(BuildFailed, match="int7"):
        build(source, tmp_path, precision="int7")
    with pytest.raises(BuildFailed, match="max_seq_len 99999 exceeds"):
        build(source, tmp_path, limits={"max_seq_len": 99999})
    with pytest.raises(BuildFailed, match="max_tiles_per_request 12 is below the 13"):
        build(source, tmp_path, limits={"max_tiles_per_request": 12})
    (source / "vocab.json").unlink()
    with pytest.raises(IncompleteCheckpoint, match="no tokenizer"):
        build(source, tmp_path)


def test_two_builds_of_one_model_do_not_mix(source: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    root = tmp_path / "artifacts" / "tiny"
    root.mkdir(parents=True)
    with FileLock(root / ".lock"), pytest.raises(BuildFailed, match="another build of tiny"):
        build(source, tmp_path)


def test_artifacts_that_cannot_be_served(source: Path, tmp_path: Path) -> None:
    empty = Artifacts(tmp_path / "nothing")
    with pytest.raises(ArtifactMismatch, match="make engines MODEL=nothing"):
        check_servable(empty, LLMBuild("bf16", 1))
    artifacts = build(source, tmp_path)
    config = artifacts.llm_checkpoint(LLMBuild("bf16", 1)) / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"vocab_size": 7}))
    with pytest.raises(ArtifactMismatch, match="vocab_size 7, expected 1283"):
        check_servable(artifacts, LLMBuild("bf16", 1))
    config.unlink()
    with pytest.raises(ArtifactMismatch, match=r"config\.json is missing"):
        check_servable(artifacts, LLMBuild("bf16", 1))
    artifacts.manifest_path.write_text('{"manifest_version": 0}')
    with pytest.raises(ArtifactMismatch, match="has version 0"):
        artifacts.manifest()
    artifacts.manifest_path.write_text("{")
    with pytest.raises(ArtifactMismatch, match="not valid JSON"):
        artifacts.manifest()
