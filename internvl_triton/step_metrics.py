"""Prometheus metrics of our own steps: Triton knows neither caches nor requests in flight.

All carry the label `model`. TensorRT-LLM's backend has its own instead of LLM_COUNTERS and
LLM_GAUGES: `nv_trt_llm_request_metrics` and `nv_trt_llm_kv_cache_block_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from internvl_triton.stage_metrics import METRICS_LOCK

__all__ = ["LLM_COUNTERS", "LLM_GAUGES", "VISION_COUNTERS", "StepMetrics"]

# Name -> what it counts, and the field of what counts it: `EncodedImages` and `EngineStats`.
VISION_COUNTERS = {
    "hits": ("internvl_feature_cache_hits_total", "Images whose visual features were kept"),
    "misses": ("internvl_feature_cache_misses_total", "Images that the vision engine encoded"),
    "tiles_run": ("internvl_vision_tiles_total", "Tiles that the vision engine encoded"),
}
LLM_COUNTERS = {
    "prompt_tokens": ("internvl_prompt_tokens_total", "Prompt tokens that were computed"),
    "reused_tokens": ("internvl_reused_tokens_total", "Prompt tokens found in the prefix cache"),
    "generated_tokens": ("internvl_generated_tokens_total", "Tokens of answers"),
    "finished": ("internvl_requests_finished_total", "Requests that got their whole answer"),
    "stopped": ("internvl_requests_stopped_total", "Requests that their caller gave up"),
    "failed": ("internvl_requests_failed_total", "Requests that the engine refused or failed"),
}
LLM_GAUGES = {
    "running": ("internvl_requests_running", "Requests that have a place in the batch"),
    "waiting": ("internvl_requests_waiting", "Requests that wait for a place in the batch"),
}

_Names = Mapping[str, tuple[str, str]]


class StepMetrics:
    """Metrics of one model that follow totals kept elsewhere. pb_utils: the backend's module."""

    def __init__(
        self,
        pb_utils: Any,
        model: str,
        totals: Callable[[], Mapping[str, float]],
        *,
        counters: _Names,
        gauges: _Names | None = None,
    ) -> None:
        """totals: field -> value now. The counters' values never fall; they begin at 0."""
        self._totals = totals
        self._counted = dict.fromkeys(counters, 0.0)
        with METRICS_LOCK:
            self._families: list[Any] = []  # they must outlive their metrics

            def add(names: _Names, kind: Any) -> dict[str, Any]:
                metrics = {}
                for field, (name, description) in names.items():
                    family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
                    self._families.append(family)
                    metrics[field] = family.Metric(labels={"model": model})
                return metrics

            self._counters = add(counters, pb_utils.MetricFamily.COUNTER)
            self._gauges = add(gauges or {}, pb_utils.MetricFamily.GAUGE)

    def publish(self) -> None:
        """Take over the totals, read under the lock: no older ones can come after newer ones."""
        with METRICS_LOCK:
            totals = self._totals()
            for field, counter in self._counters.items():
                increase = totals[field] - self._counted[field]
                if increase:
                    counter.increment(increase)
                    self._counted[field] = totals[field]
            for field, gauge in self._gauges.items():
                gauge.set(totals[field])
