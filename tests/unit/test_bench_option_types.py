"""Options of benchmarks that nothing can be measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import (
    engine_time,
    gateway_cost,
    perf_analyzer,
    pipeline_cost,
    preprocessing_time,
    soak,
)


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (preprocessing_time.main, ["--rounds=0"]),
        (preprocessing_time.main, ["--processes=0"]),
        (engine_time.main, ["--rounds=x"]),
        (engine_time.main, ["--prompt", "64", "0"]),
        (pipeline_cost.main, ["--tokens=1"]),
        (gateway_cost.main, ["--rounds=-1"]),
        (perf_analyzer.main, ["--concurrency=0"]),
        (soak.main, ["--streams=1.5"]),
    ],
)
def test_a_number_that_is_too_small_is_refused(
    main: Callable[[list[str]], int], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert "is no whole number of at least" in capsys.readouterr().err


def test_an_input_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none" / "input.json"
    assert perf_analyzer.main([f"--write-input={missing}", "--mix=text", "--requests=1"]) == 1
    assert f"--write-input {missing} cannot be written" in capsys.readouterr().err
