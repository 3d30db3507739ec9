"""Counters and gauges that follow totals."""

from dataclasses import asdict, fields
from typing import Any

from internvl_triton.cpu_llm.scheduler import EngineStats
from internvl_triton.feature_cache import EncodedImages
from internvl_triton.step_metrics import LLM_COUNTERS, LLM_GAUGES, VISION_COUNTERS, StepMetrics


class FakeBackend:
    """The part of Triton's `pb_utils` that has metrics; remembers every call."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        outer = self

        class MetricFamily:
            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, name: str, description: str, kind: str) -> None:
                assert description
                self.name = name
                outer.kinds[name] = kind

            def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802
                assert labels == {"model": "m"}
                name = self.name
                outer.values[name] = 0.0

                class Metric:
                    def increment(self, value: float) -> None:
                        assert outer.kinds[name] == "counter"
                        assert value > 0
                        outer.values[name] += value

                    def set(self, value: float) -> None:
                        assert outer.kinds[name] == "gauge"
                        outer.values[name] = value

                return Metric()

        self.MetricFamily = MetricFamily


def test_counters_grow_by_what_was_added_and_gauges_follow() -> None:
    backend = FakeBackend()
    totals = {"a": 0, "b": 0, "c": 5}
    metrics = StepMetrics(
        backend,
        "m",
        lambda: totals,
        counters={"a": ("a_total", "A"), "b": ("b_total", "B")},
        gauges={"c": ("c_now", "C")},
    )
    metrics.publish()
    assert backend.values == {"a_total": 0, "b_total": 0, "c_now": 5}
    totals = {"a": 3, "b": 0, "c": 7}
    metrics.publish()
    metrics.publish()
    assert backend.values == {"a_total": 3, "b_total": 0, "c_now": 7}
    totals = {"a": 10, "b": 1, "c": 0}
    metrics.publish()
    assert backend.values == {"a_total": 10, "b_total": 1, "c_now": 0}


def test_every_number_of_the_engine_has_a_metric() -> None:
    stats = EngineStats(1, 2, 3, 4, 5, 6, 7, 8)
    assert asdict(stats).keys() == LLM_COUNTERS.keys() | LLM_GAUGES.keys()
    assert VISION_COUNTERS.keys() == {f.name for f in fields(EncodedImages)} - {"features"}


def test_names_follow_prometheus() -> None:
    for name, _ in (*LLM_COUNTERS.values(), *VISION_COUNTERS.values()):
        assert name.startswith("internvl_")
        assert name.endswith("_total")
    assert not any(name.endswith("_total") for name, _ in LLM_GAUGES.values())
