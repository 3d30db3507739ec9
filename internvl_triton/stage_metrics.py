"""How long the parts of a request take, as Prometheus counters of a Triton Python model.

Triton's own durations know a model's whole execute() only, and end when a decoupled one returns.
`benchmarks/stages.py` puts both together.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["METRICS_LOCK", "STAGE_REQUESTS", "STAGE_SECONDS", "StageMetrics", "StageTimes"]

# Whoever touches a custom metric holds it: two threads at once in one process end the whole server.
METRICS_LOCK = threading.Lock()

STAGE_SECONDS = "internvl_stage_seconds_total"
STAGE_REQUESTS = "internvl_stage_requests_total"


class StageTimes(dict[str, float]):
    """Stage -> seconds of one request; a stage that happens twice adds up."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - started


class StageMetrics:
    """Counters `internvl_stage_seconds_total{model, stage}` and, for the number of requests they
    add up, `internvl_stage_requests_total{model}`. `pb_utils` is the backend's module."""

    def __init__(self, pb_utils: Any, model: str, stages: tuple[str, ...]) -> None:
        kind = pb_utils.MetricFamily.COUNTER
        with METRICS_LOCK:
            # Families must outlive their metrics.
            self._families = [
                pb_utils.MetricFamily(name=name, description=text, kind=kind)
                for name, text in (
                    (STAGE_SECONDS, "Time that requests spent in a stage of a model"),
                    (STAGE_REQUESTS, "Requests whose stages were added up"),
                )
            ]
            seconds, requests = self._families
            self._seconds = {
                stage: seconds.Metric(labels={"model": model, "stage": stage}) for stage in stages
            }
            self._requests = requests.Metric(labels={"model": model})

    def add(self, times: dict[str, float]) -> None:
        """Count one request. Raises KeyError for a stage that was not declared."""
        with METRICS_LOCK:
            for stage, seconds in times.items():
                self._seconds[stage].increment(seconds)
            self._requests.increment(1)
