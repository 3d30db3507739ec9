"""`make bench` once against the running service, and the pipeline around null engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench import main
from benchmarks.load_run import LoadRun
from benchmarks.paced_server import paced_server
from benchmarks.pipeline_cost import null_service, pipeline_rows
from tests.integration.conftest import Service

pytestmark = pytest.mark.triton


def test_a_sweep_of_the_service_reports_every_stage(qwen2: Service, tmp_path: Path) -> None:
    options = ["--target", f"grpc://{qwen2.server.grpc_url}"]
    options += ["--metrics-url", qwen2.server.metrics_url, "--output", str(tmp_path)]
    load = ["--concurrency", "1", "2", "--requests", "6", "--warm-up", "1", "--turns", "2"]
    workload = ["--mix", "448x448", "2@32x32:2", "--output-tokens", "8", "--no-overhead"]
    assert main([*options, *load, *workload]) == 0
    run = LoadRun.read(tmp_path)
    one, two = run.points
    assert run.settings["build"] == "the target's"
    assert 0 < one.generator_lag_ms < 10_000
    assert (one.load, two.load) == ("concurrency 1", "concurrency 2")
    for point in (one, two):
        assert point.errors == {}
        assert point.summary["requests"] == 12  # two turns each
        assert {record.output_tokens for record in point.records} == {8}
        parts = {"network", "decode", "tiling", "queue", "vision", "prefill", "decode steps"}
        assert parts <= point.stages.keys()
        latency_s = sum(point.stages.values())
        assert abs(point.stages["unaccounted"]) < 0.05 * latency_s
        assert all(seconds >= 0 for name, seconds in point.stages.items() if name != "unaccounted")
    page = (tmp_path / "report.html").read_text()
    assert "Where the time goes" in page
    assert json.loads((tmp_path / "run.json").read_text())["environment"]["commit"]
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 3


def test_an_openai_endpoint_gets_the_same_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with paced_server() as (_, address):
        options = ["--target", address, "--rate", "20", "--arrivals", "constant"]
        assert main([*options, "--requests", "5", "--output", str(tmp_path)]) == 0
    (point,) = LoadRun.read(tmp_path).points
    assert point.load == "20/s constant"
    assert point.errors == {}
    assert point.summary["lateness_p99_ms"] is not None
    assert "own cost" in capsys.readouterr().out


def test_pipeline_around_null_engines(qwen2: Service) -> None:
    model = str(qwen2.checkpoint), qwen2.artifacts_dir
    with null_service(*model) as one, null_service(*model, postprocessing_batch=64) as many:
        cases = ["text", "448x448"]
        services = {1: one, 64: many}
        rows = pipeline_rows(services, cases, requests=3, tokens=6, concurrency=2, rounds=2)
    expected = [[case, str(batch)] for case in cases for batch in services]
    assert [row[:2] for row in rows[1:]] == expected
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:])
    assert not list((qwen2.artifacts_dir).glob("*/null-*/"))


def test_what_cannot_be_run_is_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, message in (
        (["--mix", "huge"], "'huge' is no case of a mix"),
        (["--rate", "0"], "rate is 0.0; it must be above 0"),
        (["--extra-body", "[1]"], "give a JSON object"),
        (["--target", "localhost:1", "--no-overhead"], "is no target"),
        (["--target", "http://127.0.0.1:9/v1", "--no-overhead"], "did not name a model"),
    ):
        assert main(options) == 1
        assert message in capsys.readouterr().err
