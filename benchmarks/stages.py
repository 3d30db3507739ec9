"""Where a request's time goes: mean seconds of every stage, which add up to the mean latency.

Sources: Triton's durations of each model (its queue, and the rest of execute()), and our own stage
counters inside preprocessing and the CPU language model. Network is what the client waited longer
than the ensemble's request lasted, as Triton measured that; Triton's clock can stop a little after
the client has its last chunk, so it is 0 where that would be less. A model that runs once per chunk
(postprocessing) delays an answer by its last run only.

On the GPU TensorRT-LLM's backend has no stage counters: waiting and prefill are then one stage,
TTFT without everything in front of it, and decode steps are latency - TTFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.metrics import NoMetricValue, defined, latency_s, ttft_s
from benchmarks.prometheus import Samples
from benchmarks.records import RequestRecord
from internvl_triton import tensor_contract as contract
from internvl_triton.stage_metrics import STAGE_REQUESTS, STAGE_SECONDS

__all__ = ["WITHIN", "StageBreakdown", "stage_breakdown"]

WITHIN = 0.05  # of the latency may be unaccounted for
_COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class StageBreakdown:
    """stages: name -> mean seconds per request. latency_s: the mean of the same requests."""

    stages: dict[str, float]
    latency_s: float

    @property
    def unaccounted_s(self) -> float:
        """latency - sum of the stages; below 0 where stages overlap."""
        return self.latency_s - sum(self.stages.values())

    @property
    def adds_up(self) -> bool:
        """Whether the stages are within 5 % of the latency."""
        return abs(self.unaccounted_s) <= WITHIN * self.latency_s


def stage_breakdown(records: Sequence[RequestRecord], server: Samples) -> StageBreakdown:
    """records: every request that the server saw between the two readings whose difference is
    `server`. Raises NoMetricValue if a request failed or the server served something else, too."""
    answered = [record for record in records if not record.error]
    ran = {
        model.name: server.sum("nv_inference_request_success", model=model.name)
        for model in contract.MODELS
    }
    pre, vision, llm, post = (model.name for model in contract.MODELS)
    ensemble = contract.ENSEMBLE.name
    requests = server.sum("nv_inference_request_success", model=ensemble)
    if not answered or len(answered) < len(records):
        raise NoMetricValue("requests failed")
    if requests != len(records):
        raise NoMetricValue(
            f"the server counted {requests:g} requests instead of {len(records)}: it is another "
            "one, or serves others too"
        )
    latency = _mean(defined(latency_s, answered))
    ttft = _mean(defined(ttft_s, answered))
    lasted = server.sum("nv_inference_request_duration_us", model=ensemble) / 1e6 / requests
    decode = server.sum(STAGE_SECONDS, model=pre, stage="decode") / len(records)
    tiling = server.sum(STAGE_SECONDS, model=pre, stage="tiling") / len(records)
    stages = {
        "network": max(0.0, latency - lasted),
        "decode": decode,
        "tiling": tiling,
        "prompt and hand-over": _compute(server, pre, ran[pre]) - decode - tiling,
        "queue": sum(_queue(server, name, ran[name]) for name in (pre, vision, llm)),
        "vision": _compute(server, vision, ran[vision]),
    }
    detokenise = _queue(server, post, ran[post]) + _compute(server, post, ran[post])
    if generated := server.sum(STAGE_REQUESTS, model=llm):
        stages["queue"] += server.sum(STAGE_SECONDS, model=llm, stage="waiting") / generated
        stages["prefill"] = server.sum(STAGE_SECONDS, model=llm, stage="prefill") / generated
        stages["decode steps"] = server.sum(STAGE_SECONDS, model=llm, stage="decode") / generated
        hand_over = server.sum("nv_inference_compute_input_duration_us", model=llm)
        stages["prompt and hand-over"] += hand_over / 1e6 / max(1, ran[llm])
    else:
        stages["waiting and prefill"] = ttft - sum(stages.values()) - detokenise
        stages["decode steps"] = latency - ttft
    stages["detokenise"] = detokenise
    return StageBreakdown(stages, latency)


def _queue(server: Samples, model: str, runs: float) -> float:
    return server.sum("nv_inference_queue_duration_us", model=model) / 1e6 / max(1, runs)


def _compute(server: Samples, model: str, runs: float) -> float:
    names = (f"nv_inference_{part}_duration_us" for part in _COMPUTE)
    return sum(server.sum(name, model=model) for name in names) / 1e6 / max(1, runs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
