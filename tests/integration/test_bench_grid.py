"""The latency grid of the running service, and the build that it says it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.grid_report import read_runs
from benchmarks.latency_grid import main
from tests.integration.conftest import Service

pytestmark = pytest.mark.triton


def test_a_grid_of_the_service(qwen2: Service, tmp_path: Path) -> None:
    options = ["--server", qwen2.server.grpc_url, "--model", str(qwen2.checkpoint)]
    options += ["--artifacts", str(qwen2.artifacts_dir), "--output", str(tmp_path)]
    assert main([*options, "--batch", "1", "2", "--tiles", "0", "1", "--rounds", "2",
                 "--output-tokens", "6", "--seed", "77"]) == 0  # fmt: skip
    (run,) = read_runs(tmp_path)
    assert (run.model, run.build, run.profile) == ("tiny-qwen2", "bf16-tp1", "cpu")
    places = [(point.num_tiles, point.batch) for point in run.points]
    assert places == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for point in run.points:
        assert point.errors == {}
        assert point.floors == {}
        assert point.summary["requests"] == 2 * point.batch
        assert (point.summary["ttft_p50_ms"] or 0) > 0
    text, picture = run.points[0], run.points[2]
    assert picture.input_tokens - text.input_tokens == pytest.approx(256, abs=32)
    report = (tmp_path / "report.md").read_text()
    assert "No floors: the engines run on a CPU" in report
    assert "1 tile, 2 at a time" in report


def test_another_model_than_the_served_one(
    qwen2: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--server", qwen2.server.grpc_url, "--model", "demo"]) == 1
    assert "serves tiny-qwen2, and --model is demo" in capsys.readouterr().err
