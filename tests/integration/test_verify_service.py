"""`make verify MODEL=demo`: the whole program, with the real tritonserver on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from build.engines import build_engines
from build.verify import main
from internvl_triton.artifacts import LLMBuild
from internvl_triton.random_checkpoint import write_random_checkpoint
from tests.integration.conftest import tiny_service_config

pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_model_is_verified_and_a_spoilt_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "tiny", tiny_service_config("qwen2"))
    artifacts = build_engines(
        str(checkpoint), profile="cpu", artifacts_dir=tmp_path / "artifacts", progress=False
    )
    arguments = ["--model", str(checkpoint), "--profile", "cpu"]
    arguments += ["--artifacts", str(tmp_path / "artifacts")]
    assert main(arguments) == 0, capsys.readouterr().out
    folder = artifacts.root / "certificates" / "bf16-tp1-cpu"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"passed: {folder / 'certificate.html'}"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["passed"]
    served = {check["name"]: check for check in certificate["checks"]}["greedy agreement"]
    assert served["of"].endswith("of 4 answers")
    assert "<td>greedy agreement" in (folder / "certificate.html").read_text()

    rank = artifacts.llm_checkpoint(LLMBuild("bf16", 1)) / "rank0.safetensors"
    tensors = load_file(rank)
    fc, gate = (f"transformer.layers.0.mlp.{name}.weight" for name in ("fc", "gate"))
    tensors[fc], tensors[gate] = tensors[gate], tensors[fc]
    save_file(tensors, rank)
    from build.parity.questions import verification_questions

    short = verification_questions()[:1]
    for module in ("build.verify", "build.verify_engines"):
        monkeypatch.setattr(f"{module}.verification_questions", lambda: short)
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "FAIL logits" in out
    assert out.splitlines()[-1] == f"FAILED: {folder / 'certificate.html'}"
    assert not json.loads((folder / "certificate.json").read_text())["passed"]
