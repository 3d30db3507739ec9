"""Every metric against hand arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.metrics import (
    SLO,
    NoMetricValue,
    defined,
    distribution,
    errors_by_kind,
    gaps_s,
    goodput,
    image_throughput,
    itl_s,
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

approx = pytest.approx


def record(
    *chunks: float,
    sent: float = 0.0,
    ended: float | None = None,
    tokens: int | None = 0,
    error: str = "",
    **fields: object,
) -> RequestRecord:
    end = ended if ended is not None else max(chunks, default=sent)
    return RequestRecord(
        number=0,
        sent_s=sent,
        chunks_s=list(chunks),
        ended_s=end,
        output_tokens=tokens,
        error=error,
        **fields,  # type: ignore[arg-type]
    )


def test_one_request() -> None:
    r = record(1.2, 1.5, 2.0, sent=1.0, ended=2.1, tokens=5)
    assert ttft_s(r) == approx(0.2)  # 1.2 - 1.0
    assert latency_s(r) == approx(1.1)  # 2.1 - 1.0
    assert itl_s(r) == approx([0.3, 0.5])  # 1.5 - 1.2, 2.0 - 1.5
    assert tpot_s(r) == approx(0.225)  # (1.1 - 0.2) / (5 - 1): two tokens may share a chunk
    assert lateness_s(record(1.2, sent=1.0, due_s=0.75)) == approx(0.25)


@pytest.mark.parametrize(
    ("metric", "of"),
    [
        (ttft_s, record(sent=1.0, ended=2.0, tokens=1)),  # an answer without text
        (ttft_s, record(1.1, error="timeout")),
        (latency_s, record(1.1, error="timeout")),
        (itl_s, record(1.1, tokens=1)),
        (tpot_s, record(1.1, tokens=1)),
        (tpot_s, record(1.1, 1.2, tokens=2, error="timeout")),
        (tpot_s, record(1.1, 1.2, tokens=None)),
        (lateness_s, record(1.1)),
    ],
)
def test_undefined_metrics_have_no_value(metric, of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NoMetricValue):
        metric(of)


RUN = [
    record(
        10.5, 11.0, sent=10.0, ended=12.0, tokens=4, input_tokens=100, num_images=2, num_tiles=9
    ),
    record(12.5, 14.0, sent=11.0, tokens=2, input_tokens=50, num_images=1, num_tiles=1),
    record(sent=11.5, ended=15.0, tokens=7, error="RequestFailed", num_tiles=13),
    record(sent=12.0, ended=13.0, error="RequestTimedOut"),
    record(sent=12.0, ended=13.0, error="RequestFailed"),
]  # the window is 15 - 10 = 5 s


def test_rates_count_answered_requests_over_the_whole_window() -> None:
    assert window_s(RUN) == approx(5.0)
    assert request_throughput(RUN) == approx(2 / 5)
    assert output_throughput(RUN) == approx(6 / 5)
    assert total_throughput(RUN) == approx((104 + 52) / 5)
    assert image_throughput(RUN) == approx(3 / 5)
    assert tile_throughput(RUN) == approx(10 / 5)
    assert errors_by_kind(RUN) == {"RequestFailed": 2, "RequestTimedOut": 1}
    with pytest.raises(NoMetricValue):
        window_s([])


def test_lists_leave_out_what_has_no_value() -> None:
    assert defined(ttft_s, RUN) == approx([0.5, 1.5])
    assert defined(tpot_s, RUN) == approx([0.5, 1.5])  # (2 - 0.5) / 3, (3 - 1.5) / 1
    assert gaps_s(RUN) == approx([0.5, 1.5])


def test_goodput_needs_every_limit() -> None:
    assert goodput(RUN, SLO()) == approx(2 / 5)
    assert goodput(RUN, SLO(ttft_s=0.5)) == approx(1 / 5)  # a limit itself is still good
    assert goodput(RUN, SLO(ttft_s=2.0, tpot_s=0.6)) == approx(1 / 5)
    assert goodput(RUN, SLO(latency_s=1.9)) == 0
    one_token = record(0.1, sent=0.0, ended=1.0, tokens=1)
    assert goodput([one_token], SLO(ttft_s=0.2, tpot_s=0.001)) == approx(1.0)


def test_tokens_that_were_not_counted_have_no_rate() -> None:
    uncounted = record(0.5, 1.0, sent=0.0, tokens=None, input_tokens=None)
    run = [uncounted, record(1.5, sent=0.0, ended=2.0, tokens=4, input_tokens=10)]
    assert request_throughput(run) == approx(2 / 2)
    assert goodput(run, SLO(ttft_s=1.0)) == approx(1 / 2)
    for unknown in (output_throughput, total_throughput):
        with pytest.raises(NoMetricValue, match="does not count"):
            unknown(run)
    with pytest.raises(NoMetricValue, match="does not count"):
        goodput(run, SLO(tpot_s=1.0))
    failed = record(sent=0.0, ended=1.0, tokens=None, error="RequestFailed")
    assert output_throughput([failed, *run[1:]]) == approx(4 / 2)


def test_distribution() -> None:
    d = distribution([float(value) for value in range(101)])
    assert (d.count, d.mean, d.p50, d.p90, d.p99) == (101, 50.0, 50.0, 90.0, 99.0)
    assert distribution([1.0, 2.0]).p90 == approx(1.9)  # 1 + 0.9 * (2 - 1)
    with pytest.raises(NoMetricValue):
        distribution([])
