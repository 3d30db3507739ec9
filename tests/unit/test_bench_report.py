"""Reports of made-up runs."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu_use import GpuUse, mean_of_samples
from benchmarks.load_report import (
    csv_text,
    html_text,
    markdown_text,
    run_warnings,
    write_report,
)
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.metrics import SLO, errors_by_kind
from benchmarks.records import RequestRecord
from benchmarks.summary import summarise
from internvl_triton.errors import InvalidRequest


def records(count: int, *, ttft_s: float, seed: int, failed: int = 0) -> list[RequestRecord]:
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sent = number * 0.5
        first = sent + ttft_s * random.uniform(0.9, 1.1)
        chunks = [first + 0.05 * k for k in range(8)]
        record = RequestRecord(
            number, sent, None, chunks, chunks[-1], 300, 8, 1, 1, warm_up=number < 2
        )
        if number >= count - failed:
            record.error, record.message = "RequestFailed", "<out of memory>"
        made.append(record)
    return made


def point(load: str, made: list[RequestRecord], **fields: object) -> LoadPoint:
    measured = [record for record in made if not record.warm_up]
    summary = summarise(made, SLO(ttft_s=0.2))
    return LoadPoint(load, summary, errors_by_kind(measured), made, **fields)  # type: ignore[arg-type]


def run(ttft_s: float = 0.2, *, failed: int = 0, commit: str = "abc") -> LoadRun:
    stages = {"network": 0.01, "vision": 0.1, "decode steps": 0.4, "unaccounted": 0.04}
    gpus = {"0": {"utilisation_percent": 87.0, "memory_mib": 4000.0}}
    return LoadRun(
        title="demo: <448x448>",
        settings={"seed": "0"},
        environment={"commit": commit, "processor": "x"},
        points=[
            point("concurrency 1", records(42, ttft_s=ttft_s, seed=1), stages=stages, gpus=gpus),
            point("concurrency 8", records(42, ttft_s=2 * ttft_s, seed=2, failed=failed)),
        ],
        overhead={"ttft_ms": 1.5, "max_tokens_per_s": 20.0},
    )


def test_summary_leaves_the_warm_up_out() -> None:
    made = records(42, ttft_s=0.2, seed=1)
    summary = summarise(made, SLO())
    assert summary["requests"] == 40
    assert summary["window_s"] == pytest.approx(made[-1].ended_s - made[2].sent_s)
    assert summary["itl_p50_ms"] == pytest.approx(50)
    assert summary["tpot_mean_ms"] == pytest.approx(50)  # 7 gaps of 50 ms / (8 - 1)
    assert summary["lateness_p99_ms"] is None


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    written = run()
    page = write_report(written, tmp_path / "a" / "b")
    assert page.name == "report.html"
    assert LoadRun.read(tmp_path / "a" / "b") == written
    assert LoadRun.read(tmp_path / "a" / "b" / "run.json") == written
    with pytest.raises(InvalidRequest, match=r"run\.json cannot be read"):
        LoadRun.read(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(InvalidRequest, match="was not written by"):
        LoadRun.read(tmp_path)


def test_a_run_without_token_counts_has_a_report(tmp_path: Path) -> None:
    made = records(42, ttft_s=0.2, seed=1)
    for record in made:
        record.input_tokens = record.output_tokens = None
    written = run()
    written.points[0] = point("concurrency 1", made)
    summary = written.points[0].summary
    assert summary["output_tokens_per_s"] is summary["tpot_p50_ms"] is None
    assert summary["requests_per_s"] == pytest.approx(40 / summary["window_s"])  # type: ignore[operator]
    write_report(written, tmp_path)
    assert LoadRun.read(tmp_path) == written
    page = html_text(written)
    assert "concurrency 1: the endpoint does not count tokens" in page
    assert "concurrency 8: the endpoint" not in page


def test_what_makes_the_times_doubtful_is_said() -> None:
    """The stages of all requests beside the latency of those behind the warm-up."""
    written = run()
    first = written.points[0]
    mean_s = (first.summary["latency_mean_ms"] or 0.0) / 1000
    assert mean_s == pytest.approx(0.55, rel=0.02)  # as all the stages of `run` together
    assert "all requests" not in " ".join(run_warnings(written))
    assert "to note what came" not in " ".join(run_warnings(written))
    first.stages["vision"] += 0.1
    first.generator_lag_ms = 30.0
    told = " ".join(run_warnings(written))
    assert "the stages are those of all requests, 650 ms" in told
    assert "concurrency 1: the generator itself was 30 ms late (p99)" in told


def test_csv_has_a_line_per_load() -> None:
    first, second = csv.DictReader(io.StringIO(csv_text(run())))
    assert (first["load"], second["load"]) == ("concurrency 1", "concurrency 8")
    assert float(first["stage vision ms"]) == 100
    assert second["stage vision ms"] == first["lateness_mean_ms"] == ""
    assert float(second["ttft_p50_ms"]) == pytest.approx(400, rel=0.1)


@pytest.fixture(scope="module")
def page() -> str:
    return html_text(run(failed=3))


def test_markdown_and_page_hold_every_number_and_every_warning(page: str) -> None:
    for text in (markdown_text(run(failed=3)), page):
        for expected in ("concurrency 8", "3 of 40 requests failed", "abc", "goodput/s", "92.7 %"):
            assert expected in text, expected  # 0.51 / 0.55
        assert "the generator was at" in text  # 20 tokens/s is all it could do
        assert "the stages do not add up" in text  # 0.04 of 0.55 s


def test_the_page_needs_no_other_file_and_is_well_formed(page: str) -> None:
    text = page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text)
    assert "<script" not in text
    assert "<448x448>" not in text  # escaped
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 5  # curve, TTFT, ITL, stages, GPU
    for figure in figures:
        ET.fromstring(figure)
    assert "Latency and throughput" in figures[0]


def test_a_run_without_any_answer_still_gives_a_report() -> None:
    broken = run(failed=42)
    broken.points = broken.points[1:]
    assert "40 of 40 requests failed" in html_text(broken)


def test_gpu_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0, 90, 1000, 250.5\n1, 10, 500, [N/A]\n0, 70, 2000, 149.5\ngarbage\n"
    assert mean_of_samples(text) == {
        "0": {"utilisation_percent": 80, "memory_mib": 1500, "power_w": 200},
        "1": {"utilisation_percent": 10, "memory_mib": 500},
    }
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuUse() as use:
        pass
    assert use.mean() == {}
