"""The stage breakdown of a made-up metrics page, by hand."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from benchmarks.metrics import NoMetricValue
from benchmarks.prometheus import parse_samples, read_samples
from benchmarks.records import RequestRecord
from benchmarks.stages import stage_breakdown
from internvl_triton.errors import ServerUnavailable
from internvl_triton.stage_metrics import StageMetrics, StageTimes

PAGE = """\
# HELP nv_inference_request_success Number of successful inference requests
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="preprocessing",version="1"} 2
nv_inference_request_success{model="vision_encoder",version="1"} 2
nv_inference_request_success{model="tensorrt_llm",version="1"} 2
nv_inference_request_success{model="postprocessing",version="1"} 20
nv_inference_request_success{model="internvl",version="1"} 2
nv_inference_request_duration_us{model="internvl",version="1"} 1960000
nv_inference_queue_duration_us{model="preprocessing",version="1"} 10000
nv_inference_compute_input_duration_us{model="preprocessing",version="1"} 2000
nv_inference_compute_infer_duration_us{model="preprocessing",version="1"} 96000
nv_inference_compute_output_duration_us{model="preprocessing",version="1"} 2000
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 20000
nv_inference_compute_infer_duration_us{model="vision_encoder",version="1"} 400000
nv_inference_queue_duration_us{model="tensorrt_llm",version="1"} 2000
nv_inference_compute_input_duration_us{model="tensorrt_llm",version="1"} 4000
nv_inference_compute_infer_duration_us{model="tensorrt_llm",version="1"} 30000
nv_inference_queue_duration_us{model="postprocessing",version="1"} 10000
nv_inference_compute_infer_duration_us{model="postprocessing",version="1"} 50000
internvl_stage_seconds_total{model="preprocessing",stage="decode"} 0.02
internvl_stage_seconds_total{stage="tiling",model="preprocessing"} 0.06
"""
ENGINE = """\
internvl_stage_requests_total{model="tensorrt_llm"} 2
internvl_stage_seconds_total{model="tensorrt_llm",stage="waiting"} 0.1
internvl_stage_seconds_total{model="tensorrt_llm",stage="prefill"} 0.5
internvl_stage_seconds_total{model="tensorrt_llm",stage="decode"} 0.8
"""
RECORDS = [
    RequestRecord(number, sent_s=0.0, chunks_s=[0.6, 1.0], ended_s=1.0, output_tokens=10)
    for number in range(2)
]


def test_every_stage_by_hand() -> None:
    breakdown = stage_breakdown(RECORDS, parse_samples(PAGE + ENGINE))
    assert breakdown.latency_s == 1.0
    expected = {
        "network": 0.02,  # 1.0 - 1.96 / 2
        "decode": 0.01,
        "tiling": 0.03,
        "prompt and hand-over": 0.012,  # (2 + 96 + 2) ms / 2 - 10 - 30 ms, and 4 ms / 2
        "queue": 0.066,  # (10 + 20 + 2) ms / 2, and 100 ms / 2 inside the engine
        "vision": 0.2,
        "prefill": 0.25,
        "decode steps": 0.4,
        "detokenise": 0.003,  # one run: (10 + 50) ms / 20
    }
    assert breakdown.stages == pytest.approx(expected)
    assert breakdown.unaccounted_s == pytest.approx(0.009)
    assert breakdown.adds_up


def test_missing_time_is_noticed() -> None:
    without_vision = PAGE.replace("400000", "200000")
    breakdown = stage_breakdown(RECORDS, parse_samples(without_vision + ENGINE))
    assert breakdown.unaccounted_s == pytest.approx(0.109)
    assert not breakdown.adds_up


def test_without_engine_counters_the_client_tells_prefill_and_decode() -> None:
    breakdown = stage_breakdown(RECORDS, parse_samples(PAGE))
    assert breakdown.stages["decode steps"] == pytest.approx(0.4)  # 1.0 - 0.6
    # 0.6 - network 20, decode 10, tiling 30, hand-over 10, queue 16, vision 200, detokenise 3 ms
    assert breakdown.stages["waiting and prefill"] == pytest.approx(0.311)


def test_a_clock_that_stops_after_the_client_has_everything_is_unaccounted_for() -> None:
    longer = PAGE.replace("1960000", "2020000")  # 1.01 s a request, the client's latency is 1.0
    assert longer != PAGE
    breakdown = stage_breakdown(RECORDS, parse_samples(longer + ENGINE))
    assert breakdown.stages["network"] == 0.0
    assert breakdown.unaccounted_s == pytest.approx(0.029)  # 9 ms, and 20 of network that is none


def test_no_breakdown_of_other_peoples_requests_or_failures() -> None:
    page = parse_samples(PAGE + ENGINE)
    with pytest.raises(NoMetricValue, match="counted 2 requests instead of 1"):
        stage_breakdown(RECORDS[:1], page)
    failed = RequestRecord(1, error="RequestFailed")
    with pytest.raises(NoMetricValue, match="requests failed"):
        stage_breakdown([RECORDS[0], failed], page)


def test_samples() -> None:
    before = parse_samples('a_total{x="1",y="p q"} 5\nb 2.5e3 1700000000\n# a comment\n')
    after = parse_samples('a_total{y="p q",x="1"} 7\na_total{x="2"} 4\nb 2501\n')
    added = after.since(before)
    assert added.sum("a_total") == 6
    assert added.sum("a_total", x="1") == 2
    assert added.sum("b") == 1
    assert added.has("a_total", y="p q")
    assert not added.has("a_total", y="p")
    assert added.sum("c_total") == 0
    with pytest.raises(ServerUnavailable, match="cannot be read"):
        read_samples("http://127.0.0.1:9/metrics")


class FakeMetrics:
    """The backend's metric families; fails when two threads are inside at once."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._inside = threading.Lock()
        outer = self

        class Metric:
            def __init__(self, name: str, labels: dict[str, str]) -> None:
                self.key = name, tuple(sorted(labels.items()))
                outer.values[self.key] = 0.0

            def increment(self, value: float) -> None:
                assert outer._inside.acquire(blocking=False), "two threads at once"
                outer.values[self.key] += value
                outer._inside.release()

        class MetricFamily:
            COUNTER = "counter"

            def __init__(self, name: str, description: str, kind: str) -> None:
                self.name = name

            def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802
                return Metric(self.name, labels)

        self.MetricFamily = MetricFamily


def test_stage_metrics_add_up_under_one_lock() -> None:
    backend = FakeMetrics()
    metrics = StageMetrics(backend, "m", ("a", "b"))
    threads = [
        threading.Thread(target=lambda: [metrics.add({"a": 0.5, "b": 2.0}) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, requests = "internvl_stage_seconds_total", "internvl_stage_requests_total"
    assert backend.values == {
        (seconds, (("model", "m"), ("stage", "a"))): 400.0,
        (seconds, (("model", "m"), ("stage", "b"))): 1600.0,
        (requests, (("model", "m"),)): 800.0,
    }
    with pytest.raises(KeyError):
        metrics.add({"c": 1.0})


def test_stage_times_add_up() -> None:
    times = StageTimes()
    with times.stage("decode"):
        pass
    first = times["decode"]
    with times.stage("decode"):
        pass
    assert times["decode"] > first >= 0
    with pytest.raises(ZeroDivisionError), times.stage("tiling"):
        _ = 1 / 0
    assert times.keys() == {"decode", "tiling"}
