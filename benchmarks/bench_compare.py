"""Two load runs side by side: ratios with bootstrap confidence intervals.

    python -m benchmarks.bench_compare --a RUN_A --b RUN_B

Compares the loads that both runs have. A ratio is B / A; its 95 % interval comes from resampling
each run's requests (see `ratio`). Where the interval holds 1, so many requests cannot tell the runs
apart. There is a verdict only where both runs asked the same, and had it answered.

Requests/s, tokens/s, images/s, tiles/s and goodput/s have no interval and no verdict. A rate is one
value per run: in an open loop it is that of the arrivals, and in a closed loop its window ends with
the last user, whose time no resampling of requests repeats. (Simulated with 8 users, 40 requests
and the same service twice: an interval from the requests' latencies calls 14 to 25 % of such pairs
different, not 5 %.) What the requests do tell is the share of them within the SLO.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.load_report import run_warnings
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.markdown import markdown_table
from benchmarks.metrics import NoMetricValue, defined, itl_s, latency_s, tpot_s, ttft_s
from benchmarks.records import RequestRecord
from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program

__all__ = ["LoadComparison", "cautions", "compare", "differences", "different_requests", "ratio"]

_RESAMPLES = 2000
# Simulated: with so many requests, about 5 % of pairs of runs of the same service are called
# different; with means of 10 requests it is 12 %, with a p99 of 40 requests 10 %.
_ENOUGH, _ENOUGH_FOR_P99 = 20, 100
_MOST_FAILED = 0.01
_RATES = {
    "requests/s": "requests_per_s",
    "output tokens/s": "output_tokens_per_s",
    "images/s": "images_per_s",
    "tiles/s": "tiles_per_s",
}
_NEEDED = ("requests", "failed", "window_s", "goodput_per_s", *_RATES.values())
_NOTE = (
    "An interval tells chance from difference within these two runs, as if requests were\n"
    "independent. It knows nothing of what else kept the machine busy in one of them, and a rate\n"
    "per second, one value per run, has none: run A, B, A, B, and see whether a difference stays."
)
Values = Sequence[float]
Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
Rows = list[list[str]]


def ratio(
    a: Values, b: Values, statistic: Statistic, *, seed: int = 0
) -> tuple[float, float, float]:
    """statistic(b) / statistic(a), and its 95 % percentile bootstrap interval.

    statistic: of the last axis. Formula: the 2.5 % and 97.5 % quantiles of statistic(b*) /
    statistic(a*) over 2,000 pairs of samples drawn with replacement, of the sizes of a and b.
    Raises NoMetricValue of fewer than 2 values, and when statistic(a) or any statistic(a*) is 0.
    """
    if min(len(a), len(b)) < 2:
        raise NoMetricValue("fewer than two values")
    random = np.random.default_rng(seed)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    drawn = [
        statistic(sample[random.integers(len(sample), size=(_RESAMPLES, len(sample)))])
        for sample in (first, second)
    ]
    if statistic(first) == 0 or np.any(drawn[0] == 0):
        raise NoMetricValue("a division by 0")
    low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975))
    return float(statistic(second) / statistic(first)), float(low), float(high)


@dataclass(frozen=True)
class LoadComparison:
    """cautions: what to know before reading the rows. rows: the header, then a metric each."""

    load: str
    cautions: list[str]
    rows: Rows


def compare(a: LoadRun, b: LoadRun) -> list[LoadComparison]:
    """One for each load of both runs. The k-th load of a name is paired with the k-th of that name.

    Raises InvalidRequest when the runs have no load in common, or lack what `make bench` writes.
    """
    _check("A", a)
    _check("B", b)
    one, other = _places(a), _places(b)
    if not one.keys() & other.keys():
        raise InvalidRequest(
            f"the runs have no load in common: A has {', '.join(one) or 'none'}, B has "
            f"{', '.join(other) or 'none'}; measure both at the same --concurrency or --rate"
        )
    return [_compare_load(a, b, name, one[name], other[name]) for name in one if name in other]


def cautions(a: LoadRun, b: LoadRun) -> list[str]:
    """What makes the whole comparison doubtful, then what makes each run's numbers doubtful."""
    found = []
    if asked := different_requests(a, b):
        found.append(
            f"not the same requests: {'; '.join(asked)}; the ratios below compare different work"
        )
    if not _same_slo(a, b):
        one, other = (run.settings.get("SLO") for run in (a, b))
        found.append(f"goodput has different limits: {_in_both('SLO', one, other)}")
    names = _places(a), _places(b)
    for run, mine, others in (("A", *names), ("B", *reversed(names))):
        if alone := [name for name in mine if name not in others]:
            found.append(f"only {run} has {', '.join(alone)}")
    return found + [
        f"{name}: {text}" for name, run in (("A", a), ("B", b)) for text in run_warnings(run)
    ]


def differences(a: LoadRun, b: LoadRun) -> Rows:
    """Header, then what was not the same in both runs."""
    one, other = ({**run.settings, **run.environment} for run in (a, b))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [["", "A", "B"], *([name, one.get(name, ""), other.get(name, "")] for name in names)]


def _check(name: str, run: LoadRun) -> None:
    """Raises InvalidRequest for a run that lacks what is read here."""
    again = "measure it again with `make bench`"
    if not isinstance(run.settings, dict) or not isinstance(run.environment, dict):
        raise InvalidRequest(f"{name} has no settings or no environment; {again}")
    for point in run.points:
        summary = point.summary if isinstance(point.summary, dict) else {}
        lacking = [n for n in _NEEDED if not isinstance(summary.get(n, ""), int | float | None)]
        if lacking:
            raise InvalidRequest(
                f"{name}, {point.load}: its summary has no number {', '.join(lacking)}; {again}"
            )
        if not point.measured:
            raise InvalidRequest(f"{name}, {point.load}: no request was measured; {again}")
    try:
        run_warnings(run)
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{name} is not complete ({error!r}); {again}") from error


def _places(run: LoadRun) -> dict[str, int]:
    """Name of a load -> its place in the run; a name that comes again has its count behind it."""
    places: dict[str, int] = {}
    for place, point in enumerate(run.points):
        before = sum(earlier.load == point.load for earlier in run.points[:place])
        places[f"{point.load}, time {before + 1}" if before else point.load] = place
    return places


# --- what was asked -----------------------------------------------------------------------------


def different_requests(a: LoadRun, b: LoadRun) -> list[str]:
    """What was not asked alike, a text each.

    That is every setting but the build, the target and the model, which are what is compared, and
    the SLO, which the server does not see. The seed counts when it draws sizes, lengths or
    arrivals, not when it draws only pixels and words.
    """
    one, other = _asked(a), _asked(b)
    if _seed_is_harmless(a) and _seed_is_harmless(b):
        one["seed"] = other["seed"] = ""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [_in_both(name, one.get(name), other.get(name)) for name in names]


def _asked(run: LoadRun) -> dict[str, str]:
    return {k: v for k, v in run.settings.items() if k not in ("build", "target", "model", "SLO")}


def _seed_is_harmless(run: LoadRun) -> bool:
    """Whether another seed draws the same sizes, lengths and arrivals: one case, fixed lengths."""
    workload, answer = run.settings.get("workload", ""), run.settings.get("answer", "")
    one_case = re.match(r"[^+]+, \d+ words", workload) and re.match(r"\d+ tokens", answer)
    return bool(one_case) and not any(point.load.endswith("poisson") for point in run.points)


def _same_slo(a: LoadRun, b: LoadRun) -> bool:
    return a.settings.get("SLO") == b.settings.get("SLO")


def _in_both(name: str, one: str | None, other: str | None) -> str:
    shown = ("not noted" if value is None else f"{value!r}" for value in (one, other))
    return "{} is {} in A and {} in B".format(name, *shown)


def _other_draws(a: LoadRun, b: LoadRun, place_a: int, place_b: int) -> list[str]:
    """What shows that the requests of two loads were not the same, a text each."""
    found = []
    if place_a != place_b and not (_seed_is_harmless(a) and _seed_is_harmless(b)):
        found.append(
            f"every load of a run draws its own, and this is load {place_a + 1} of A but "
            f"{place_b + 1} of B"
        )
    one, other = (
        {record.number: (record.num_images, record.num_tiles) for record in point.measured}
        for point in (a.points[place_a], b.points[place_b])
    )
    both = one.keys() & other.keys()
    if unlike := sum(one[number] != other[number] for number in both):
        found.append(f"{unlike} of {len(both)} conversations have other pictures or tiles")
    return found


# --- one load -----------------------------------------------------------------------------------


def _compare_load(a: LoadRun, b: LoadRun, name: str, place_a: int, place_b: int) -> LoadComparison:
    first, second = a.points[place_a], b.points[place_b]
    found, withheld = [], ""  # withheld: why there is no verdict
    if draws := _other_draws(a, b, place_a, place_b):
        found.append(f"not the same requests: {'; '.join(draws)}")
    if draws or different_requests(a, b):
        withheld = "different requests"
    failures = [(p.summary["failed"] or 0, p.summary["requests"] or 0) for p in (first, second)]
    if any(failed for failed, _ in failures):
        shown = [f"{failed:g} of {requests:g}" for failed, requests in failures]
        found.append(
            f"{shown[0]} requests failed in A and {shown[1]} in B; the times are those of the rest"
        )
    if any(failed > _MOST_FAILED * requests for failed, requests in failures):
        withheld = withheld or "requests failed"
    lengths = [float(np.mean(_answer_lengths(point) or [0])) for point in (first, second)]
    unlike = ""
    if not (first.counts_tokens and second.counts_tokens):
        found.append("an endpoint does not count tokens: nobody knows whose answers are longer")
        unlike = "unknown lengths"
    elif all(lengths) and abs(lengths[0] - lengths[1]) > 0.01 * max(lengths):
        unlike = "different answers"
        found.append(
            f"answers have {lengths[0]:.1f} tokens in A and {lengths[1]:.1f} in B (mean): latency "
            "and rates are those of answers of different length"
        )
    answered = [f"{requests - failed:g} of {requests:g}" for failed, requests in failures]
    rows = [["", "A", "B", "B / A", "95 %", "verdict"]]
    rows.append(["requests answered", *answered, "-", "-", "-"])
    for metric in _METRICS:
        reason = withheld or (unlike if metric.by_length else "")
        rows += _row(metric, metric.values(first), metric.values(second), reason)
    for label, key in _RATES.items():
        rows += _rate_row(label, first.summary[key], second.summary[key])
    if not (_same_slo(a, b) and a.settings.get("SLO", "").startswith("none")):
        rows += _rate_row("goodput/s", *(p.summary["goodput_per_s"] for p in (first, second)))
        reason = withheld or ("" if _same_slo(a, b) else "different SLO")
        rows += _row(_WITHIN_SLO, _WITHIN_SLO.values(first), _WITHIN_SLO.values(second), reason)
    return LoadComparison(name, found, rows)


def _row(metric: _Metric, a: Values, b: Values, withheld: str) -> Rows:
    """One row; none where neither run has a value."""
    if not a and not b:
        return []
    shown = [f"{metric.statistic(np.array(v)):.4g}" if v else "-" for v in (a, b)]
    if min(len(a), len(b)) < metric.enough:
        withheld = withheld or "too few requests"
    try:
        quotient, low, high = (f"{value:.3f}" for value in ratio(a, b, metric.statistic))
    except NoMetricValue:
        return [[metric.label, *shown, "-", "-", withheld or "no ratio"]]
    # Of the numbers that are shown: 1.0000001 is no difference.
    verdict = withheld or _verdict(float(low), float(high), metric.lower_is_better)
    return [[metric.label, *shown, quotient, f"{low} - {high}", verdict]]


def _rate_row(label: str, a: float | None, b: float | None) -> Rows:
    """One row without a verdict; none where both are 0 or not defined."""
    if not a and not b:
        return []
    shown = ["-" if value is None else f"{value:.4g}" for value in (a, b)]
    return [[label, *shown, f"{b / a:.3f}" if a and b is not None else "-", "-", "-"]]


def _verdict(low: float, high: float, lower_is_better: bool) -> str:
    if low <= 1 <= high:
        return "no difference seen"
    return "B better" if (high < 1) == lower_is_better else "A better"


# --- metrics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """by_length: a longer answer changes it. enough: requests that a verdict takes."""

    label: str
    values: Callable[[LoadPoint], list[float]]
    statistic: Statistic
    lower_is_better: bool = True
    by_length: bool = False
    enough: int = _ENOUGH


def _mean(values: Array) -> Array:
    return np.mean(values, axis=-1)  # type: ignore[no-any-return]


def _percentile(q: float) -> Statistic:
    return lambda values: np.percentile(values, q, axis=-1)


def _ms(metric: Callable[[RequestRecord], float]) -> Callable[[LoadPoint], list[float]]:
    return lambda point: [1000 * value for value in defined(metric, point.measured)]


def _mean_itl(record: RequestRecord) -> float:
    gaps = itl_s(record)
    return sum(gaps) / len(gaps)


def _tokens_per_second(record: RequestRecord) -> float:
    """Of one answer: output tokens / latency. Raises NoMetricValue without tokens or latency."""
    latency = latency_s(record)
    if not record.output_tokens or not latency:
        raise NoMetricValue("no tokens, or no time")
    return record.output_tokens / latency


def _within_slo(point: LoadPoint) -> list[float]:
    """100 for every request within the SLO, 0 for every other one: goodput * window of them. []
    where nobody knows."""
    if point.summary["goodput_per_s"] is None:
        return []
    requests = round(point.summary["requests"] or 0)
    within = round(point.summary["goodput_per_s"] * (point.summary["window_s"] or 0))
    return [100.0] * within + [0.0] * (requests - within)


def _answer_lengths(point: LoadPoint) -> list[int]:
    """[] where tokens were not counted."""
    lengths = [record.output_tokens for record in point.measured if not record.error]
    return [length for length in lengths if length is not None]


_METRICS = (
    _Metric("TTFT mean, ms", _ms(ttft_s), _mean),
    _Metric("TTFT p50, ms", _ms(ttft_s), _percentile(50)),
    _Metric("TTFT p90, ms", _ms(ttft_s), _percentile(90)),
    _Metric("TTFT p99, ms", _ms(ttft_s), _percentile(99), enough=_ENOUGH_FOR_P99),
    _Metric("ITL of a request, mean, ms", _ms(_mean_itl), _mean),
    _Metric("TPOT mean, ms", _ms(tpot_s), _mean),
    _Metric("latency mean, ms", _ms(latency_s), _mean, by_length=True),
    _Metric("latency p90, ms", _ms(latency_s), _percentile(90), by_length=True),
    _Metric(
        "latency p99, ms", _ms(latency_s), _percentile(99), by_length=True, enough=_ENOUGH_FOR_P99
    ),
    _Metric(
        "output of one request, mean, tokens/s",
        lambda point: defined(_tokens_per_second, point.measured),
        _mean,
        lower_is_better=False,
        by_length=True,
    ),
)
_WITHIN_SLO = _Metric("within the SLO, % of requests", _within_slo, _mean, lower_is_better=False)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--a", type=Path, required=True, help="run.json of a run, or its folder")
    parser.add_argument("--b", type=Path, required=True, help="of the other one")
    args = parser.parse_args(argv)
    a, b = LoadRun.read(args.a), LoadRun.read(args.b)
    loads = compare(a, b)
    parts = [f"A: {a.title} ({args.a})\nB: {b.title} ({args.b})"]
    parts += [f"**Careful: {text}.**" for text in cautions(a, b)]
    for load in loads:
        parts.append(f"## {load.load}")
        parts += [f"**Careful: {text}.**" for text in load.cautions]
        parts.append(markdown_table(load.rows))
    _, *found = differences(a, b)
    if found:
        facts = [
            f"- {name}\n    A: {one or '-'}\n    B: {other or '-'}" for name, one, other in found
        ]
        parts.append("## What else differs\n\n" + "\n".join(facts))
    print("\n\n".join([*parts, _NOTE]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
