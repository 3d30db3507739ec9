"""All metrics of one load point as flat numbers, in the units that reports show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from benchmarks.metrics import (
    SLO,
    NoMetricValue,
    defined,
    distribution,
    errors_by_kind,
    gaps_s,
    goodput,
    image_throughput,
    latency_s,
    lateness_s,
    output_throughput,
    request_throughput,
    tile_throughput,
    total_throughput,
    tpot_s,
    ttft_s,
    window_s,
)
from benchmarks.records import RequestRecord

__all__ = ["summarise"]

_Rate = Callable[[Sequence[RequestRecord]], float]
_RATES: dict[str, _Rate] = {
    "requests_per_s": request_throughput,
    "output_tokens_per_s": output_throughput,
    "total_tokens_per_s": total_throughput,
    "images_per_s": image_throughput,
    "tiles_per_s": tile_throughput,
}
_TIMES: dict[str, Callable[[Sequence[RequestRecord]], list[float]]] = {
    "ttft": lambda records: defined(ttft_s, records),
    "itl": gaps_s,
    "tpot": lambda records: defined(tpot_s, records),
    "latency": lambda records: defined(latency_s, records),
    "lateness": lambda records: defined(lateness_s, records),
}


def summarise(records: Sequence[RequestRecord], slo: SLO) -> dict[str, float | None]:
    """Name -> value; None where a metric is not defined. Times are in ms. The warm-up is left out.

    Raises NoMetricValue when there is nothing but a warm-up.
    """
    measured = [record for record in records if not record.warm_up]
    summary: dict[str, float | None] = {
        "requests": len(measured),
        "failed": sum(errors_by_kind(measured).values()),
        "window_s": window_s(measured),
    }
    rates: dict[str, _Rate] = {"goodput_per_s": functools.partial(goodput, slo=slo), **_RATES}
    summary |= {name: _defined(rate, measured) for name, rate in rates.items()}
    for name, values in _TIMES.items():
        summary |= _distribution_ms(name, values(measured))
    return summary


def _defined(rate: _Rate, records: Sequence[RequestRecord]) -> float | None:
    try:
        return rate(records)
    except NoMetricValue:
        return None


def _distribution_ms(name: str, values: Sequence[float]) -> dict[str, float | None]:
    try:
        found = distribution(values)
    except NoMetricValue:
        return {f"{name}_{part}_ms": None for part in ("mean", "p50", "p90", "p99")}
    parts = {"mean": found.mean, "p50": found.p50, "p90": found.p90, "p99": found.p99}
    return {f"{name}_{part}_ms": 1000 * value for part, value in parts.items()}
