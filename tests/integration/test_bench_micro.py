"""The micro-benchmarks that run PyTorch, each once on something tiny."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from benchmarks.engine_time import llm_rows, vision_rows
from build.engines import build_engines
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint


def test_the_language_model_is_converted_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from benchmarks.conversion_time import measure_loading

    checkpoint = write_random_checkpoint(tmp_path / "tiny", tiny_config("internlm2", "300m"))
    scratch = tmp_path / "scratch"
    rows = measure_loading(checkpoint, scratch, rounds=1)
    assert [row.file_cache for row in rows] == ["cold", "warm"]
    weights = sum(path.stat().st_size for path in (scratch / "transformers").glob("*.safetensors"))
    for row in rows:
        assert (len(row.conversions_s), len(row.loads_s)) == (1, 1)
        assert min(row.conversions_s + row.loads_s) > 0
        assert row.llm_bytes == weights
        assert min(row.conversion_peak_bytes, row.load_peak_bytes) > 10e6
    assert [path.name for path in scratch.iterdir()] == ["transformers"]


def test_a_load_takes_every_weight_into_memory(tmp_path: Path) -> None:
    """400 MB of weights that `from_pretrained` alone leaves in their file."""
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from benchmarks.conversion_time import _run, load, write_for_transformers

    peaks = []
    for vocab_size in (1283, 200_000):
        config = tiny_config("qwen2", "300m", llm_layers=1, head_dim=128, vocab_size=vocab_size)
        checkpoint = write_random_checkpoint(tmp_path / f"{vocab_size}", config, zeros=True)
        directory = tmp_path / f"hf{vocab_size}"
        _run(write_for_transformers, checkpoint, directory)
        assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
        peaks.append(_run(load, directory)[1])
    assert 390e6 < peaks[1] - peaks[0] < 450e6  # 2 * 198,717 * 512 bf16 numbers: 407 MB


def test_processes_are_measured() -> None:
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from benchmarks.preprocessing_time import process_rows, scaling_cells

    head, row = process_rows([(300, 300)], processes=2, rounds=1, seconds=0.0)
    assert (len(head), row[0]) == (7, "300x300")
    for alone, together, ratio in (row[1:4], row[4:]):
        assert min(float(alone), float(together), float(ratio.split()[0])) > 0
    cells = scaling_cells([10.0, 20.0, 10.0], [20.0, 30.0, 5.0])
    assert cells == ["10.0", "20.0", "1.50 (0.50-2.00)"]


def test_processes_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is the only one of two to come to the start does not begin."""
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from benchmarks import preprocessing_time

    start = threading.Barrier(2, timeout=0.01)
    monkeypatch.setattr(preprocessing_time, "_start", start, raising=False)
    with pytest.raises(threading.BrokenBarrierError):
        preprocessing_time._pictures_per_second("ours", 300, 300, 0.0, seed=0, together=True)


def test_both_language_models_give_the_same_answers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from build import Port

    checkpoint = write_random_checkpoint(
        tmp_path / "tiny", tiny_config("qwen2", "300m", llm_layers=1)
    )
    artifacts = build_engines(
        str(checkpoint), profile="cpu", artifacts_dir=tmp_path / "artifacts", progress=False
    )
    port = Port(checkpoint)
    _, alone, together = llm_rows(artifacts, port, prompt_tokens=12, tokens=5, rounds=1)
    assert (alone[0], alone[-1]) == ("1", "1 of 1")
    assert (together[0], together[-1]) == ("8", "8 of 8")
    for row in vision_rows(artifacts, port, tile_counts=(1, 2), rounds=1)[1:]:
        assert float(row[-1]) < 1e-3
    assert float(alone[1]) > 0
