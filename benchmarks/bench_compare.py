"""Two load runs side by side: ratios with bootstrap confidence intervals.

    python -m benchmarks.bench_compare --a RUN_A --b RUN_B

Compares the loads that both runs have. A ratio is B / A; its 95 % interval comes from resampling
each run's requests. Where the interval holds 1, so many requests cannot tell the runs apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.markdown import markdown_table
from benchmarks.metrics import NoMetricValue, defined, itl_s, latency_s, tpot_s, ttft_s
from benchmarks.records import RequestRecord
from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program

__all__ = ["compare", "ratio"]

_RESAMPLES = 2000
_NOTE = (
    "The intervals tell chance from difference within these two runs. They know nothing of what "
    "else kept the machine busy in one of them: run A, B, A, B, and see whether it stays so."
)
Values = Sequence[float]
Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]


def ratio(
    a: Values, b: Values, statistic: Statistic, *, seed: int = 0
) -> tuple[float, float, float]:
    """statistic(b) / statistic(a), and its 95 % percentile bootstrap interval.

    statistic: of the last axis. Formula: the 2.5 % and 97.5 % quantiles of statistic(b*) /
    statistic(a*) over 2,000 pairs of samples drawn with replacement, of the sizes of a and b.
    """
    random = np.random.default_rng(seed)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    drawn = [
        statistic(sample[random.integers(len(sample), size=(_RESAMPLES, len(sample)))])
        for sample in (first, second)
    ]
    low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975))
    return float(statistic(second) / statistic(first)), float(low), float(high)


def compare(a: LoadRun, b: LoadRun) -> list[tuple[str, list[list[str]]]]:
    """Load -> table of metrics. Raises InvalidRequest when the runs have no load in common."""
    others = {point.load: point for point in b.points}
    pairs = [(point, others[point.load]) for point in a.points if point.load in others]
    if not pairs:
        raise InvalidRequest(
            f"the runs have no load in common: {', '.join(p.load for p in a.points)} and "
            f"{', '.join(others)}"
        )
    return [(one.load, _table(one, other)) for one, other in pairs]


def differences(a: LoadRun, b: LoadRun) -> list[list[str]]:
    """Header, then what was not the same in both runs."""
    one, other = ({**run.settings, **run.environment} for run in (a, b))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [["", "A", "B"], *([name, one.get(name, ""), other.get(name, "")] for name in names)]


def _table(a: LoadPoint, b: LoadPoint) -> list[list[str]]:
    rows = [["", "A", "B", "B / A", "95 %", "verdict"]]
    for name, unit, lower_is_better, statistic, values in _METRICS:
        first, second = values(a.measured), values(b.measured)
        if len(first) < 2 or len(second) < 2:
            continue
        one, other = statistic(np.array(first)), statistic(np.array(second))
        if not one:
            continue
        quotient, low, high = ratio(first, second, statistic)
        rows.append(
            [
                f"{name}, {unit}",
                f"{one:.4g}",
                f"{other:.4g}",
                f"{quotient:.3f}",
                f"{low:.3f} - {high:.3f}",
                _verdict(low, high, lower_is_better),
            ]
        )
    # Rates have one value per run: their uncertainty is that of the latency they come from.
    for name in ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "failed"):
        one_rate, other_rate = a.summary[name] or 0.0, b.summary[name] or 0.0
        quotient_text = f"{other_rate / one_rate:.3f}" if one_rate else "-"
        cells = [f"{one_rate:.4g}", f"{other_rate:.4g}", quotient_text, "", ""]
        rows.append([name.replace("_per_s", "/s").replace("_", " "), *cells])
    return rows


def _verdict(low: float, high: float, lower_is_better: bool) -> str:
    if low <= 1 <= high:
        return "no difference seen"
    return "B better" if (high < 1) == lower_is_better else "A better"


def _mean(values: Array) -> Array:
    return np.mean(values, axis=-1)  # type: ignore[no-any-return]


def _p50(values: Array) -> Array:
    return np.percentile(values, 50, axis=-1)  # type: ignore[no-any-return]


def _p90(values: Array) -> Array:
    return np.percentile(values, 90, axis=-1)  # type: ignore[no-any-return]


def _ms(
    metric: Callable[[RequestRecord], float],
) -> Callable[[Sequence[RequestRecord]], list[float]]:
    return lambda records: [1000 * value for value in defined(metric, records)]


def _mean_itl(record: RequestRecord) -> float:
    gaps = itl_s(record)
    return sum(gaps) / len(gaps)


def _tokens_per_second(record: RequestRecord) -> float:
    """Of one answer: output tokens / latency. Raises NoMetricValue without tokens."""
    if not record.output_tokens:
        raise NoMetricValue("no tokens")
    return record.output_tokens / latency_s(record)


_METRICS = [
    ("TTFT mean", "ms", True, _mean, _ms(ttft_s)),
    ("TTFT p50", "ms", True, _p50, _ms(ttft_s)),
    ("TTFT p90", "ms", True, _p90, _ms(ttft_s)),
    ("ITL, mean of a request, mean", "ms", True, _mean, _ms(_mean_itl)),
    ("TPOT mean", "ms", True, _mean, _ms(tpot_s)),
    ("latency mean", "ms", True, _mean, _ms(latency_s)),
    ("latency p90", "ms", True, _p90, _ms(latency_s)),
    ("output of one request, mean", "tokens/s", False, _mean,
     lambda records: defined(_tokens_per_second, records)),
]  # fmt: skip


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--a", type=Path, required=True, help="run.json of a run, or its folder")
    parser.add_argument("--b", type=Path, required=True, help="of the other one")
    args = parser.parse_args(argv)
    a, b = LoadRun.read(args.a), LoadRun.read(args.b)
    tables = compare(a, b)
    print(f"A: {a.title}\nB: {b.title}\n\n{markdown_table(differences(a, b))}")
    for load, rows in tables:
        print(f"\n{load}\n\n{markdown_table(rows)}")
    print(f"\n{_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
