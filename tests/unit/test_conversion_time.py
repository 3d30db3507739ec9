"""The benchmark of conversion time, on a model that takes no time."""

import math
from pathlib import Path

import pytest

from benchmarks import conversion_time
from benchmarks.conversion_time import Measured, measure, report
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, *, vision_layers: int | None, llm_layers: int | None) -> dict[str, object]:
        return tiny_config("internlm2", "6b", llm_layers=llm_layers or 2)

    monkeypatch.setattr(conversion_time, "published_config", tiny)


def test_a_conversion_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    row = measure(tmp_path, "InternVL2_5-26B", 4, rounds=2)
    assert (row.model, row.layers) == ("InternVL2_5-26B", "4")
    spec = ModelSpec.from_config(tiny_config("internlm2", "6b", llm_layers=4))
    weights = sum(math.prod(shape) for shape in checkpoint_shapes(spec).values())
    assert 0 < row.checkpoint_bytes - 2 * weights < 50_000  # headers and config.json
    assert (len(row.copies_s), len(row.conversions_s)) == (3, 2)
    assert min(row.copies_s + row.conversions_s) > 0
    assert 50e6 < row.peak_bytes < conversion_time.MAX_PEAK_BYTES
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
