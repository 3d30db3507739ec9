"""The benchmark of conversion time, on a model that takes no time."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import conversion_time
from benchmarks.conversion_memory import peak_bytes
from benchmarks.conversion_time import BesideLoading, Measured, loading_rows, measure, report
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, *, vision_layers: int | None, llm_layers: int | None) -> dict[str, object]:
        return tiny_config("internlm2", "6b", llm_layers=llm_layers or 2)

    monkeypatch.setattr(conversion_time, "published_config", tiny)


def test_a_conversion_is_measured_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the load, which needs transformers: see tests/integration/test_bench_micro.py."""
    monkeypatch.setattr(conversion_time, "measure_loading", lambda *args, rounds: [])
    row, _ = measure(tmp_path, "InternVL2_5-26B", 4, rounds=2)
    assert (row.model, row.layers) == ("InternVL2_5-26B", "4")
    spec = ModelSpec.from_config(tiny_config("internlm2", "6b", llm_layers=4))
    weights = sum(math.prod(shape) for shape in checkpoint_shapes(spec).values())
    assert 0 < row.checkpoint_bytes - 2 * weights < 50_000  # headers, config.json, tokenizer
    assert (len(row.copies_s), len(row.conversions_s)) == (3, 2)
    assert min(row.copies_s + row.conversions_s) > 0
    assert 30e6 < row.peak_bytes < conversion_time.MAX_PEAK_BYTES
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_no_hole(tmp_path: Path) -> None:
    checkpoint = conversion_time._random_checkpoint(tmp_path / "c", "any", None)
    file = checkpoint / "model.safetensors"
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    end = file.read_bytes()[-64:]
    assert end.count(0) < 8


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(conversion_time.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(BuildFailed, match=r"has 0\.0 GB free, converting x needs 0\.0 GB more"):
        measure(tmp_path, "x", None, rounds=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("convert_s", "peak_bytes", "fine"),
    [(6.0, 2_999_999_999, True), (6.1, 1, False), (1.0, 3_000_000_000, False)],
)
def test_limits(
    convert_s: float, peak_bytes: int, fine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 times the copy's 2 s in the middle of three rounds, and less than 3 GB."""
    row = Measured("m", "all", 10**9, (1.0, 3.0, 1.0, 3.0), (2.0, convert_s, 50.0), peak_bytes)
    assert row.ratios == pytest.approx([1.0, convert_s / 2, 25.0])
    assert report([row]) is fine
    assert ("NOT all within" in capsys.readouterr().out) is not fine


def test_loading_rows() -> None:
    measured = Measured("m", "4", 10**9, (1.0, 1.0), (2.0,), 10**9)
    cold = BesideLoading("cold", 2 * 10**9, (6.0, 9.0, 4.0), (2.0, 1.0, 2.0), 10**8, 4 * 10**8)
    assert cold.ratios == [3.0, 9.0, 2.0]
    head, row = loading_rows([(measured, [cold])])
    assert row[:6] == ["m", "4", "2.00", "cold", "6.00", "2.00"]
    assert row[6:] == ["3.00 (2.00-9.00)", "100", "400", "0.25"]
    assert len(head) == len(row)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package_is_named_before_anything_is_written(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def find(name: str) -> object:
        return None if name == missing else object()

    monkeypatch.setattr(conversion_time, "find_spec", find)
    with pytest.raises(InvalidRequest, match=f"needs {missing}, which is not installed"):
        conversion_time.check_packages()
    assert conversion_time.main(["--work-dir", str(tmp_path / "w")]) == 1
    assert "make test-env" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_peak_is_this_process_alone() -> None:
    """A child of a process that once held 300 MB."""
    held = np.ones(300_000_000, np.uint8)
    assert peak_bytes() >= held.nbytes
    del held
    assert conversion_time._run(peak_bytes) < 200e6
