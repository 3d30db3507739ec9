"""The latency grid: what is served, floors of a point, and builds side by side in one report."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.grid_report import GridPoint, GridRun, csv_text, markdown_text, read_runs
from benchmarks.latency_grid import _check_batches, _point, case_of, floors_of_point, main
from benchmarks.records import RequestRecord
from benchmarks.served_build import ServedBuild, served_build
from build.plan import make_plan, spec_of
from build.planner.floors import Floors
from build.planner.gpus import GPUS
from internvl_triton.artifacts import LLMBuild
from internvl_triton.errors import InvalidRequest
from internvl_triton.gpu_deployment import GpuDeployment
from internvl_triton.limits import Limits
from internvl_triton.triton_config import Deployment, render_repository

SPEC_8B = spec_of("InternVL2_5-8B")
SERVED = ServedBuild("InternVL2_5-8B", LLMBuild("fp8", 2, "fp8"), "gpu", 8, 13)


def floors(tp_size: int) -> Floors:
    return Floors.checked(SPEC_8B, LLMBuild("bf16", tp_size), GPUS["A100-80G"])


def parameters(deployment: Deployment, model: str) -> dict[str, str]:
    text = render_repository(deployment)[model]
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_configs_say_what_is_served(profile: str) -> None:
    gpu = GpuDeployment(Path("/artifacts/x/llm/fp8-kv_fp8-tp2/engine"), "bfloat16", 2, "fp8")
    deployment = Deployment(
        spec=SPEC_8B,
        limits=Limits.for_model(SPEC_8B, max_batch_size=4),
        model="InternVL2_5-8B",
        artifacts_dir="../..",
        llm_checkpoint="llm/int4-tp4/checkpoint",
        gpu=gpu if profile == "gpu" else None,
    )
    found = served_build(parameters(deployment, "internvl"), parameters(deployment, "tensorrt_llm"))
    llm = LLMBuild("fp8", 2, "fp8") if profile == "gpu" else LLMBuild("int4", 4)
    assert found == ServedBuild("InternVL2_5-8B", llm, profile, 4, 13)  # type: ignore[arg-type]


def test_another_service_is_refused() -> None:
    ensemble = {"model": "x", "max_batch_size": "8", "max_tiles": "12", "use_thumbnail": "true"}
    with pytest.raises(InvalidRequest, match="the service is none of this project"):
        served_build(ensemble, {})
    with pytest.raises(InvalidRequest, match="none of this project"):
        served_build(ensemble, {"llm_checkpoint": "somewhere/else"})
    without = served_build(
        {**ensemble, "use_thumbnail": "false"}, {"llm_checkpoint": "llm/bf16-tp1/checkpoint"}
    )
    assert without.max_tiles == 12


def test_what_the_service_cannot_do_is_not_asked() -> None:
    assert case_of(0, most=13).name == "text"
    assert case_of(13, most=13).size == (4 * 448, 3 * 448)  # and a thumbnail
    with pytest.raises(InvalidRequest, match=r"--tiles has 13; a picture .* has up to 7"):
        case_of(13, most=7)
    with pytest.raises(InvalidRequest, match="1 tile, or 3 to 13"):
        case_of(2, most=13)
    _check_batches([1, 8], SERVED)
    with pytest.raises(InvalidRequest, match="--batch has 16; this service was built for 1 to 8"):
        _check_batches([1, 16], SERVED)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_floors_of_a_point_are_the_plans(tp_size: int) -> None:
    report = make_plan("InternVL2_5-8B", gpu="A100-80G", tp_size=tp_size)
    planned = {row["part"]: 1000 * row["floor_s"] for row in report["one request, no other"]}
    found = floors_of_point(
        floors(tp_size), num_tiles=13, batch=1, input_tokens=3392, output_tokens=128
    )
    assert found["ttft_ms"] == pytest.approx(planned["first token"])
    assert found["tpot_ms"] == found["step_ms"] == pytest.approx(planned["every further token"])
    assert found["latency_ms"] == pytest.approx(planned["answer, 128 tokens"])
    assert found["vision_ms"] + found["prefill_ms"] == pytest.approx(found["ttft_ms"])
    full = floors_of_point(
        floors(tp_size), num_tiles=13, batch=8, input_tokens=3392, output_tokens=128
    )
    assert full["ttft_ms"] == found["ttft_ms"]
    assert full["step_ms"] > found["step_ms"]
    (row,) = (row for row in report["load"] if row["batch"] == 8)
    assert full["output_tokens_per_s"] == pytest.approx(row["ceiling_output_tokens_per_s"])


def records(count: int, *, ttft_s: float, failed: int = 0) -> list[RequestRecord]:
    made = []
    for number in range(count):
        sent = float(number)
        chunks = [sent + ttft_s + 0.02 * k for k in range(4)]
        made.append(RequestRecord(number, sent, None, chunks, chunks[-1], 3392, 4, 1, 13))
        if number >= count - failed:
            made[-1].error, made[-1].message = "Overloaded", "too many"
    return made


def point(
    num_tiles: int, batch: int, ttft_s: float, *, tp_size: int = 0, failed: int = 0
) -> GridPoint:
    made = _point(num_tiles, batch, records(40, ttft_s=ttft_s, failed=failed), 4)
    if tp_size:
        made.floors = floors_of_point(
            floors(tp_size),
            num_tiles=num_tiles,
            batch=batch,
            input_tokens=made.input_tokens,
            output_tokens=4,
        )
    return made


def run(tp_size: int, points: list[GridPoint], *, profile: str = "gpu") -> GridRun:
    return GridRun(
        model="InternVL2_5-8B",
        build=f"bf16-tp{tp_size}",
        profile=profile,
        floors="Floors: A100-80G.",
        settings={"answer": "4 tokens"},
        environment={"commit": f"abc{tp_size}"},
        points=points,
    )


def test_points_are_summarised_by_the_load_generators_metrics() -> None:
    made = point(13, 8, 0.5, failed=2)
    assert made.summary["ttft_p50_ms"] == pytest.approx(500)
    assert made.summary["tpot_p50_ms"] == pytest.approx(20)
    assert made.summary["latency_p99_ms"] == pytest.approx(560)
    assert (made.input_tokens, made.errors) == (3392, {"Overloaded": 2})


def cells_of(text: str, title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table below a heading."""
    block = text.partition(f"## {title}\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {first: others for first, *others in rows}


def test_builds_stand_side_by_side() -> None:
    two = run(2, [point(1, 1, 0.1, tp_size=2), point(13, 8, 0.4, tp_size=2)])
    four = run(4, [point(13, 8, 0.25, tp_size=4)])
    text = markdown_text([two, four])
    ttft = cells_of(text, "TTFT p50, ms")
    head = ["bf16-tp2 (gpu)", "floor", "/ floor", "bf16-tp4 (gpu)", "floor", "/ floor"]
    assert ttft[""] == head
    assert list(ttft)[2:] == ["1 tile, 1 at a time", "13 tiles, 8 at a time"]
    least = [each.points[-1].floors["ttft_ms"] for each in (two, four)]
    assert ttft["13 tiles, 8 at a time"] == [
        *["400.0", f"{least[0]:.1f}", f"{400 / least[0]:.2f}"],
        *["250.0", f"{least[1]:.1f}", f"{250 / least[1]:.2f}"],
    ]
    assert ttft["1 tile, 1 at a time"][3:] == ["-", "-", "-"]
    tpot = cells_of(text, "ms per output token (TPOT p50)")["13 tiles, 8 at a time"]
    assert tpot[0] == "20.00"
    rate = two.points[1].summary["output_tokens_per_s"] or 0
    most = two.points[1].floors["output_tokens_per_s"]
    tokens = cells_of(text, "output tokens/s")["13 tiles, 8 at a time"]
    assert tokens[:3] == [f"{rate:.1f}", f"{most:,.1f}", f"{rate / most:.0%}"]
    parts = cells_of(text, "Floors, ms")
    assert parts[""][0] == "bf16-tp2 (gpu) vision"
    assert parts["13 tiles, 8 at a time"][1] == f"{two.points[1].floors['prefill_ms']:.2f}"
    for fact in ("commit: abc2", "commit: abc4", "Floors: A100-80G.", "answer: 4 tokens"):
        assert fact in text
    assert "Careful" not in text


def test_without_floors_there_is_no_column_for_them() -> None:
    cpu = run(1, [point(1, 1, 0.1, failed=3)], profile="cpu")
    text = markdown_text([cpu])
    assert cells_of(text, "TTFT p50, ms")[""] == ["bf16-tp1 (cpu)"]
    assert "## Floors" not in text
    assert "bf16-tp1 (cpu), 1 tile, 1 at a time: 3 of 40 requests failed (Overloaded)" in text
    mixed = markdown_text([cpu, run(2, [point(1, 1, 0.1, tp_size=2)])])
    assert cells_of(mixed, "TTFT p50, ms")[""][:2] == ["bf16-tp1 (cpu)", "bf16-tp2 (gpu)"]
    hopeless = run(1, [point(1, 1, 0.1, failed=40)])
    assert cells_of(markdown_text([hopeless]), "TTFT p50, ms")["1 tile, 1 at a time"] == ["-"]


def test_csv_has_a_line_per_build_and_point() -> None:
    two = run(2, [point(1, 1, 0.1), point(13, 8, 0.4, tp_size=2)])
    first, second = csv.DictReader(io.StringIO(csv_text([two])))
    assert (first["build"], first["tiles"], first["batch"]) == ("bf16-tp2", "1", "1")
    assert first["floor ttft_ms"] == ""
    assert float(second["floor ttft_ms"]) == pytest.approx(
        two.points[1].floors["ttft_ms"], rel=1e-5
    )
    assert float(second["ttft_p50_ms"]) == pytest.approx(400)


def test_runs_are_kept_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_only = ["--report-only", "--output", str(tmp_path)]
    assert main(report_only) == 1
    assert "holds no run of `make bench-grid`" in capsys.readouterr().err
    two, eight = run(2, [point(1, 1, 0.1, tp_size=2)]), run(8, [point(1, 1, 0.05, tp_size=8)])
    assert eight.write(tmp_path).name == "bf16-tp8-gpu.json"
    two.write(tmp_path)
    assert read_runs(tmp_path) == [two, eight]
    assert main(report_only) == 0
    assert "bf16-tp8 (gpu)" in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == markdown_text([two, eight])
    assert len((tmp_path / "grid.csv").read_text().splitlines()) == 3
    replace(two, settings={"answer": "9 tokens"}).write(tmp_path)
    with pytest.raises(InvalidRequest, match=r"runs of different kinds: .* use another --output"):
        read_runs(tmp_path)
    (tmp_path / "bf16-tp2-gpu.json").write_text(json.dumps({"format": 1, "points": []}))
    with pytest.raises(InvalidRequest, match="was not written by `make bench-grid`"):
        read_runs(tmp_path)
    (tmp_path / "bf16-tp2-gpu.json").write_text('{"format": 9}')
    with pytest.raises(InvalidRequest, match="has format 9; this release reads 1"):
        read_runs(tmp_path)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "127.0.0.1:9"]) == 1
    assert "127.0.0.1:9 does not describe its models" in capsys.readouterr().err
