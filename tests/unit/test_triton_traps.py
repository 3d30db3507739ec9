"""Traps of tritonserver 2.51 that our code has to keep out of, as far as no server is needed.

The rest, and a table of what covers what: tests/integration/test_triton_traps.py.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from internvl_triton import triton_server
from internvl_triton.stage_metrics import METRICS_LOCK, StageMetrics
from internvl_triton.step_metrics import LLM_COUNTERS, LLM_GAUGES, StepMetrics

ROOT = Path(__file__).parents[2]
SERVER_CODE = sorted((ROOT / "internvl_triton").rglob("*.py")) + sorted(
    (ROOT / "model_repository").rglob("*.py")
)


class GuardedMetric:
    """Fails when it is touched by someone who does not hold the lock."""

    def __init__(self, **_: Any) -> None:
        assert METRICS_LOCK.locked()

    def increment(self, _: float) -> None:
        assert METRICS_LOCK.locked()

    def set(self, _: float) -> None:
        assert METRICS_LOCK.locked()


class GuardedFamily(GuardedMetric):
    COUNTER, GAUGE = "counter", "gauge"
    Metric = GuardedMetric


PB_UTILS = SimpleNamespace(MetricFamily=GuardedFamily)


def test_metrics_are_touched_under_one_lock() -> None:
    """Two threads in custom metrics at once end the whole server."""
    stages = StageMetrics(PB_UTILS, "model", ("one", "two"))
    stages.add({"one": 0.1, "two": 0.2})
    totals = dict.fromkeys((*LLM_COUNTERS, *LLM_GAUGES), 0.0)
    steps = StepMetrics(PB_UTILS, "model", lambda: totals, counters=LLM_COUNTERS, gauges=LLM_GAUGES)
    totals.update(dict.fromkeys(totals, 3.0))
    steps.publish()
    using = {path.name for path in SERVER_CODE if "MetricFamily" in path.read_text()}
    assert using == {"stage_metrics.py", "step_metrics.py"}


def test_no_client_asks_for_status_codes_in_a_stream() -> None:
    """With that header, an error sent at the wrong moment is a use-after-free in the server."""
    for path in SERVER_CODE:
        for line in path.read_text().splitlines():
            is_comment = line.lstrip().startswith("#")
            assert is_comment or "triton_grpc_error" not in line, f"{path.name}: {line}"


def test_errors_of_the_language_model_come_with_the_end_of_the_stream() -> None:
    """Sent separately, error and FINAL are the same use-after-free."""
    code = (ROOT / "model_repository" / "tensorrt_llm" / "1" / "model.py").read_text()
    failing = [line.strip() for line in code.splitlines() if "InferenceResponse(error=" in line]
    assert failing
    assert all(line.startswith("sender.send(") and "flags=FINAL" in line for line in failing)


def test_tiles_are_not_cached_by_triton() -> None:
    """It would hash every tile byte by byte, and does not verify a hit."""
    configs = sorted((ROOT / "model_repository").glob("*/config.pbtxt"))
    assert len(configs) == 5
    assert not [path for path in configs if "response_cache" in path.read_text()]


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs of 2.51 send strings of such arrays empty, and crash on numbers."""
    assert triton_server.environment_problem() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    problem = triton_server.environment_problem()
    assert problem is not None
    assert (
        'numpy 2.1.0, which the stubs of this tritonserver cannot use; run: pip install "numpy<2'
        in (problem)
    )
