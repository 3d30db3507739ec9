"""perf_analyzer itself against the ensemble; it is installed if it is not there."""

from __future__ import annotations

import pytest

from benchmarks.perf_analyzer import FOLDER, ensure_perf_analyzer, main
from internvl_triton.errors import BuildFailed
from tests.integration.conftest import Service

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("case", ["text", "448x448"])
def test_its_numbers_beside_ours(
    qwen2: Service, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ensure_perf_analyzer(FOLDER)
    except BuildFailed as error:
        pytest.skip(str(error))
    options = ["--requests=4", "--concurrency=2", "--output-tokens=8", "--mix", case]
    assert main([f"--server={qwen2.server.grpc_url}", *options]) == 0
    table = capsys.readouterr().out
    rows = {
        cells[1].strip(): cells[2:4]
        for line in table.splitlines()
        if (cells := line.split("|"))[1:]
    }
    assert [cell.strip() for cell in rows["failed"]] == ["0", "0"]
    for metric in ("requests/s", "output tokens/s", "ttft p50 ms", "latency p50 ms"):
        assert all(float(cell) > 0 for cell in rows[metric])
