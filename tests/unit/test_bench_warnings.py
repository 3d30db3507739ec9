"""What a report says of its own numbers, and that doubtful ones never look like good ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load_report import markdown_text
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.metrics import SLO, goodput
from benchmarks.overhead import measure_overhead
from benchmarks.records import RequestRecord
from benchmarks.summary import summarise
from benchmarks.workload import Case, GeneratedWorkload
from internvl_triton.errors import InvalidRequest


def made(count: int = 40, *, late_s: float = 0.0, text: bool = True) -> list[RequestRecord]:
    return [
        RequestRecord(
            number,
            sent_s=number + late_s,
            due_s=float(number),
            chunks_s=[number + late_s + 0.1] if text else [],
            ended_s=number + late_s + 0.5,
            output_tokens=4,
        )
        for number in range(count)
    ]


def report(records: list[RequestRecord], **fields: object) -> str:
    point = LoadPoint("1/s", summarise(records, SLO()), {}, records, **fields)  # type: ignore[arg-type]
    return markdown_text(LoadRun("a run", {}, {}, [point]))


def test_a_sound_run_has_no_warning() -> None:
    assert "Careful" not in report(made())


def test_warnings() -> None:
    assert "sent up to 50 ms late" in report(made(late_s=0.05))
    assert "sent up to" not in report(made(late_s=0.01))
    assert "40 answers had no text" in report(made(text=False))
    assert "p99 of 5 requests says little" in report(made(5))
    assert "no stages, because requests failed" in report(made(), no_stages="requests failed")
    stages = {"prefill": 0.3, "unaccounted": 0.2}
    assert "do not add up" in report(made(), stages=stages)


def test_an_answer_without_text_meets_no_limit_of_ttft() -> None:
    records = made(text=False)
    assert goodput(records, SLO(ttft_s=0.2)) == 0
    assert goodput(records, SLO(latency_s=1.0)) > 0


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_are_none(limit: float) -> None:
    with pytest.raises(InvalidRequest, match="the limit of tpot_s"):
        SLO(tpot_s=limit)


def test_a_run_holds_no_nan(tmp_path: Path) -> None:
    point = LoadPoint("1/s", {"ttft_p50_ms": float("nan")}, {}, [])
    with pytest.raises(ValueError, match="JSON"):
        LoadRun("a run", {}, {}, [point]).write(tmp_path)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_generators_own_cost(protocol: str) -> None:
    workload = GeneratedWorkload((Case.parse("text"),))
    found = measure_overhead(protocol, workload, concurrency=2, conversations=8)
    assert 0 <= found.token_ms < found.ttft_ms < 1000
    assert found.token_ms > 0 or protocol == "http"  # where events can arrive together
    assert 0 < found.cpu_ms_per_request < 1000
    assert found.concurrency == 2
    # 32 tokens a request, one after the other at the least.
    assert found.max_tokens_per_s > 32 / (found.ttft_ms + 32 * found.token_ms) * 1000 / 4
