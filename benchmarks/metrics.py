"""Every number of a load run: one pure function each, with its formula.

Of one request: `ttft_s`, `itl_s`, `tpot_s`, `latency_s`. They raise NoMetricValue where they are
undefined, so that nothing is averaged over made-up zeros. Of a run: rates over its window, which
begins with the first measured request's sending and ends with the last one's end. Requests with an
error count in `errors_by_kind` and lower every rate; they have no latency.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.records import RequestRecord
from internvl_triton.errors import InvalidRequest

__all__ = [
    "SLO",
    "Distribution",
    "NoMetricValue",
    "defined",
    "distribution",
    "errors_by_kind",
    "gaps_s",
    "goodput",
    "image_throughput",
    "itl_s",
    "latency_s",
    "lateness_s",
    "output_throughput",
    "request_throughput",
    "tile_throughput",
    "total_throughput",
    "tpot_s",
    "ttft_s",
    "window_s",
]

Records = Sequence[RequestRecord]


class NoMetricValue(Exception):
    """The metric is not defined for this request or run."""


# --- of one request -----------------------------------------------------------------------------


def latency_s(r: RequestRecord) -> float:
    """ended - sent. Raises NoMetricValue for a failed request."""
    if r.error:
        raise NoMetricValue("the request failed")
    return r.ended_s - r.sent_s


def ttft_s(r: RequestRecord) -> float:
    """First chunk with text - sent. Raises NoMetricValue without text or for a failed request."""
    if r.error or not r.chunks_s:
        raise NoMetricValue("no text came")
    return r.chunks_s[0] - r.sent_s


def itl_s(r: RequestRecord) -> list[float]:
    """Gaps between consecutive chunks with text. Raises NoMetricValue below 2 chunks."""
    if r.error or len(r.chunks_s) < 2:
        raise NoMetricValue("fewer than two chunks with text")
    return [after - before for before, after in zip(r.chunks_s, r.chunks_s[1:], strict=False)]


def tpot_s(r: RequestRecord) -> float:
    """(latency - TTFT) / (output_tokens - 1). Raises NoMetricValue below 2 tokens, or where they
    were not counted."""
    tokens = _counted(r.output_tokens)
    if tokens < 2:
        raise NoMetricValue("fewer than two tokens")
    return (latency_s(r) - ttft_s(r)) / (tokens - 1)


def lateness_s(r: RequestRecord) -> float:
    """sent - due: how late the load generator was. Raises NoMetricValue in a closed loop."""
    if r.due_s is None:
        raise NoMetricValue("the request had no planned time")
    return r.sent_s - r.due_s


def defined(
    metric: Callable[[RequestRecord], float], records: Iterable[RequestRecord]
) -> list[float]:
    """The metric's values of those requests that have one."""
    values = []
    for record in records:
        try:
            values.append(metric(record))
        except NoMetricValue:
            continue
    return values


def gaps_s(records: Iterable[RequestRecord]) -> list[float]:
    """All requests' ITL in one list."""
    gaps: list[float] = []
    for record in records:
        try:
            gaps += itl_s(record)
        except NoMetricValue:
            continue
    return gaps


# --- of a run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """Of `count` values. Percentiles are interpolated linearly (numpy's default)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


def distribution(values: Sequence[float]) -> Distribution:
    """Raises NoMetricValue of no values."""
    if not values:
        raise NoMetricValue("no values")
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Distribution(len(values), float(np.mean(values)), p50, p90, p99)


def window_s(records: Records) -> float:
    """max(ended) - min(sent). Raises NoMetricValue without requests."""
    if not records:
        raise NoMetricValue("no requests")
    return max(r.ended_s for r in records) - min(r.sent_s for r in records)


def request_throughput(records: Records) -> float:
    """Requests/s: answered requests / window."""
    return len(_answered(records)) / window_s(records)


def output_throughput(records: Records) -> float:
    """Tokens/s: output tokens of answered requests / window. Raises NoMetricValue where an
    answer's were not counted."""
    return sum(_counted(r.output_tokens) for r in _answered(records)) / window_s(records)


def total_throughput(records: Records) -> float:
    """Tokens/s: input + output tokens of answered requests / window. Visual tokens are input.
    Raises NoMetricValue where an answer's were not counted."""
    answered = _answered(records)
    total = sum(_counted(r.input_tokens) + _counted(r.output_tokens) for r in answered)
    return total / window_s(records)


def image_throughput(records: Records) -> float:
    """Images/s (frames of videos count): images of answered requests / window."""
    return sum(r.num_images for r in _answered(records)) / window_s(records)


def tile_throughput(records: Records) -> float:
    """Tiles/s: tiles of answered requests / window, whether the server encoded or cached them."""
    return sum(r.num_tiles for r in _answered(records)) / window_s(records)


@dataclass(frozen=True)
class SLO:
    """Upper limits in seconds; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest for a limit that no request could meet or break."""
        for name, limit in asdict(self).items():
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                raise InvalidRequest(f"the limit of {name} is {limit}; give seconds above 0")

    def met_by(self, r: RequestRecord) -> bool:
        """Whether all limits hold. TPOT, which an answer of one token does not have, then breaks no
        limit; an answer without text breaks that of TTFT, a failed request breaks all.

        Raises NoMetricValue for a limit of TPOT where tokens were not counted.
        """
        if r.error or (self.ttft_s is not None and not r.chunks_s):
            return False
        if self.tpot_s is not None:
            _counted(r.output_tokens)
        limits = ((ttft_s, self.ttft_s), (tpot_s, self.tpot_s), (latency_s, self.latency_s))
        return all(
            value <= limit
            for metric, limit in limits
            if limit is not None
            for value in defined(metric, [r])
        )


def goodput(records: Records, slo: SLO) -> float:
    """Requests/s within the SLO: requests that meet every limit / window. Raises NoMetricValue
    where nobody knows (`SLO.met_by`)."""
    return sum(slo.met_by(r) for r in records) / window_s(records)


def errors_by_kind(records: Records) -> dict[str, int]:
    """Kind -> number of requests, the most frequent first."""
    return dict(Counter(r.error for r in records if r.error).most_common())


def _counted(tokens: int | None) -> int:
    if tokens is None:
        raise NoMetricValue("the endpoint does not count tokens")
    return tokens


def _answered(records: Records) -> list[RequestRecord]:
    return [r for r in records if not r.error]
