"""The engines' benchmark on a real GPU: it ends well, and nothing is faster than its floor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.engine_only import main
from benchmarks.trtllm_bench import PROGRAM
from build import build_engines
from build.machine import Machine

pytestmark = pytest.mark.gpu


def test_engines_are_timed_beside_their_floors(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_engines("demo", profile="gpu", artifacts_dir=tmp_path)
    options = ["--model", "demo", "--profile", "gpu", "--artifacts", str(tmp_path)]
    options += ["--rounds", "10", "--llm-tiles", "1", "--at-a-time", "1,2", "--waves", "2"]
    assert main([*options, "--output-tokens", "16"]) == 0
    (file,) = (tmp_path / "benchmarks" / "engine_only").glob("demo-tp1-*/results.json")
    results = json.loads(file.read_text())
    assert [row["num_tiles"] for row in results["vision"]] == [1, 2, 4, 7, 13, 26]
    for row in results["vision"]:
        assert row["median_ms"] > row.get("floor_ms", 0)
        assert row["call_ms"] > 0.8 * row["median_ms"]  # it also copies, but clocks vary
    if shutil.which(PROGRAM) is None:
        assert f"{PROGRAM} is not on PATH" in capsys.readouterr().out
        return
    assert [row["concurrency"] for row in results["llm"]] == [1, 1, 2]
    for row in results["llm"]:
        least = row.get("floors", {"ttft_ms": 0, "tpot_ms": 0})
        assert row["ttft_ms"] > least["ttft_ms"]
        assert row["tpot_ms"] > least["tpot_ms"]
