"""Comparisons of made-up load runs: the arithmetic, the pairs, and when there is no verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_compare import (
    LoadComparison,
    cautions,
    compare,
    differences,
    different_requests,
    main,
    ratio,
)
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.metrics import SLO, NoMetricValue, errors_by_kind
from benchmarks.records import RequestRecord
from benchmarks.summary import summarise
from internvl_triton.errors import InvalidRequest

SETTINGS = {
    "target": "grpc://a",
    "model": "demo",
    "workload": "448x448, 16 words",
    "answer": "8 tokens, never fewer",
    "SLO": "ttft <= 0.2 s",
    "seed": "0",
}
VERDICTS = {"A better", "B better", "no difference seen"}


def records(
    count: int, *, ttft_s: float, gap_s: float = 0.05, tokens: int = 8, failed: int = 0
) -> list[RequestRecord]:
    """A request every 0.5 s, TTFTs within 10 % of `ttft_s`; the last ones fail."""
    random = np.random.default_rng(round(1000 * ttft_s))
    made = []
    for number in range(count):
        sent = number * 0.5
        first = sent + ttft_s * random.uniform(0.9, 1.1)
        chunks = [first + gap_s * k for k in range(tokens)]
        record = RequestRecord(number, sent, None, chunks, chunks[-1], 300, tokens, 1, 1)
        if number >= count - failed:
            record.error, record.message = "RequestFailed", "out of memory"
        made.append(record)
    return made


def point(load: str, made: list[RequestRecord]) -> LoadPoint:
    return LoadPoint(load, summarise(made, SLO(ttft_s=0.2)), errors_by_kind(made), made)


def run(*points: LoadPoint, commit: str = "abc", command: str = "", **settings: str) -> LoadRun:
    environment = {"commit": commit, "command": f"python -m benchmarks.bench {command}"}
    return LoadRun("demo", SETTINGS | settings, environment, list(points))


def simple(
    ttft_s: float = 0.2, *, count: int = 120, failed: int = 0, gap_s: float = 0.05, tokens: int = 8
) -> LoadPoint:
    made = records(count, ttft_s=ttft_s, failed=failed, gap_s=gap_s, tokens=tokens)
    return point("concurrency 1", made)


def table(compared: LoadComparison) -> dict[str, list[str]]:
    return {row[0]: row for row in compared.rows}


def verdicts(compared: LoadComparison) -> set[str]:
    return {row[5] for row in compared.rows[1:]} - {"-"}


# --- ratios -------------------------------------------------------------------------------------


def test_ratio_and_its_interval() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(100, 10, 200), random.normal(120, 10, 200)

    def mean(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=-1)

    quotient, low, high = ratio(a.tolist(), b.tolist(), mean)
    assert quotient == b.mean() / a.mean()
    # Delta method: the ratio's standard error from those of the two means.
    error = quotient * np.hypot(a.std() / a.mean(), b.std() / b.mean()) / np.sqrt(200)
    assert low == pytest.approx(quotient - 1.96 * error, abs=0.004)
    assert high == pytest.approx(quotient + 1.96 * error, abs=0.004)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0] * 30, id="all are 0"),
        pytest.param([0.0] * 29 + [1.0], id="a resample may hold only the zeros"),
        pytest.param([], id="no values"),
        pytest.param([1.0], id="one value"),
    ],
)
def test_no_ratio_to_nothing(values: Sequence[float]) -> None:
    with pytest.raises(NoMetricValue):
        ratio(values, [1.0, 2.0], lambda drawn: np.mean(drawn, axis=-1))


def test_answers_that_come_at_once_print_no_nan() -> None:
    """TPOT and ITL are 0 for A."""
    (compared,) = compare(run(simple(gap_s=0.0)), run(simple(gap_s=0.05)))
    shown = table(compared)
    assert shown["TPOT mean, ms"][1:] == ["0", "50", "-", "-", "no ratio"]
    assert shown["ITL of a request, mean, ms"][5] == "no ratio"
    assert not any("nan" in cell or "inf" in cell for row in compared.rows for cell in row)


# --- verdicts -----------------------------------------------------------------------------------


def test_verdicts_of_runs_that_asked_the_same() -> None:
    (compared,) = compare(run(simple(0.2)), run(simple(0.3), commit="def"))
    assert compared.cautions == []
    shown = table(compared)
    assert float(shown["TTFT p50, ms"][3]) == pytest.approx(1.5, rel=0.02)
    assert shown["TPOT mean, ms"][5] == "no difference seen"
    for name in ("TTFT p50, ms", "TTFT p99, ms", "latency p99, ms"):
        assert shown[name][5] == "A better"
    assert shown["output of one request, mean, tokens/s"][5] == "A better"
    assert shown["requests answered"][1:3] == ["120 of 120", "120 of 120"]
    assert differences(run(), run(commit="def")) == [["", "A", "B"], ["commit", "abc", "def"]]


def test_rates_have_no_interval_and_the_share_within_the_slo_has() -> None:
    """About half of the TTFTs of 0.18 to 0.22 s are within 0.2 s, of those above 0.27 s none."""
    (compared,) = compare(run(simple(0.2)), run(simple(0.3)))
    shown = table(compared)
    for name in ("requests/s", "output tokens/s", "images/s", "tiles/s", "goodput/s"):
        assert shown[name][4:] == ["-", "-"], name
        assert float(shown[name][1]) > 0
    assert shown["images/s"][1] == shown["requests/s"][1]  # one picture each
    within = shown["within the SLO, % of requests"]
    made = records(120, ttft_s=0.2)
    expected = 100 * sum(r.chunks_s[0] - r.sent_s <= 0.2 for r in made) / 120
    assert float(within[1]) == pytest.approx(expected, rel=1e-3)
    assert within[2:] == ["0", "0.000", "0.000 - 0.000", "A better"]


def test_rows_that_say_nothing_are_left_out() -> None:
    texts = [replace(record, num_images=0, num_tiles=0) for record in records(40, ttft_s=0.2)]
    runs = [run(point("concurrency 1", texts), SLO="none: goodput counts every answer")] * 2
    (compared,) = compare(*runs)
    assert not table(compared).keys() & {"images/s", "tiles/s", "goodput/s"}


@pytest.mark.parametrize(
    ("count", "mean", "p99"),
    [(19, "too few requests", "too few requests"), (99, "A better", "too few requests"),
     (100, "A better", "A better")],
)  # fmt: skip
def test_few_requests_give_no_verdict(count: int, mean: str, p99: str) -> None:
    (compared,) = compare(run(simple(0.2, count=count)), run(simple(0.3, count=count)))
    assert table(compared)["TTFT mean, ms"][5] == mean
    assert table(compared)["TTFT p99, ms"][5] == p99


# --- what was asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"workload": "1280x720, 16 words"}, id="mix"),
        pytest.param({"workload": "448x448, 16 words, 3 turns"}, id="turns"),
        pytest.param({"workload": "448x448, 8-32 words"}, id="prompt lengths"),
        pytest.param({"answer": "64 tokens, never fewer"}, id="answer lengths"),
        pytest.param({"answer": "8 tokens, may stop earlier"}, id="let_stop"),
        pytest.param({"a setting of a later release": "1"}, id="unknown setting"),
        pytest.param({"distinct pictures": "4"}, id="distinct"),
    ],
)
def test_different_requests_give_a_warning_and_no_verdict(settings: dict[str, str]) -> None:
    a, b = run(simple(0.2)), run(simple(0.3), **settings)
    assert "not the same requests" in cautions(a, b)[0]
    value = next(iter(settings.values()))
    assert value in cautions(a, b)[0]
    (compared,) = compare(a, b)
    assert verdicts(compared) == {"different requests"}


def test_the_target_the_model_and_the_machine_are_what_is_compared() -> None:
    a = run(simple())
    b = run(simple(), target="http://b", model="other", commit="def", command="--output x")
    assert different_requests(a, b) == cautions(a, b) == []


@pytest.mark.parametrize(
    ("settings", "load", "counts"),
    [
        pytest.param({}, "concurrency 1", False, id="one case, fixed lengths"),
        pytest.param({}, "2/s constant", False, id="arrivals at set times"),
        pytest.param({}, "2/s poisson", True, id="arrivals at random"),
        pytest.param({"workload": "448x448 + text, 16 words"}, "concurrency 1", True, id="mix"),
        pytest.param({"workload": "448x448, 8-32 words"}, "concurrency 1", True, id="prompts"),
        pytest.param({"answer": "normal:9:2 tokens, never fewer"}, "concurrency 1", True, id="ans"),
        pytest.param({"workload": "/data/pictures"}, "concurrency 1", True, id="files"),
    ],
)
def test_a_seed_counts_where_it_changes_the_work(
    settings: dict[str, str], load: str, counts: bool
) -> None:
    """Every load of a run draws with its own seed, so its place counts as a seed does."""
    first, second = (point(load, records(40, ttft_s=ttft_s)) for ttft_s in (0.2, 0.3))
    a, b = run(first, **settings), run(second, **settings | {"seed": "1"})
    assert bool(different_requests(a, b)) == counts
    assert (verdicts(compare(a, b)[0]) == {"different requests"}) == counts
    moved = run(point("another", first.records), second, **settings)
    assert different_requests(a, moved) == []
    (compared,) = compare(a, moved)
    assert (verdicts(compared) == {"different requests"}) == counts
    assert ("load 1 of A but 2 of B" in " ".join(compared.cautions)) == counts


def test_other_pictures_of_the_same_name_are_noticed() -> None:
    """As of a folder whose files have changed: 3 of 40 requests have more tiles."""
    other = records(40, ttft_s=0.3)
    for record in other[:3]:
        record.num_tiles = 7
    a, b = run(simple(0.2, count=40)), run(point("concurrency 1", other))
    (compared,) = compare(a, b)
    assert "3 of 40 conversations have other pictures or tiles" in compared.cautions[0]
    assert verdicts(compared) == {"different requests"}


def test_another_slo_takes_the_verdict_from_goodput_only() -> None:
    """The server never sees it."""
    a, b = run(simple(0.2)), run(simple(0.3), SLO="ttft <= 1 s")
    assert "goodput has different limits" in cautions(a, b)[0]
    (compared,) = compare(a, b)
    shown = table(compared)
    assert shown["within the SLO, % of requests"][5] == "different SLO"
    assert shown["goodput/s"][5] == "-"
    assert shown["TTFT mean, ms"][5] == "A better"


def test_shorter_answers_are_no_faster_ones() -> None:
    stops = "8 tokens, may stop earlier"
    a, b = run(simple(tokens=8), answer=stops), run(simple(tokens=4), answer=stops)
    (compared,) = compare(a, b)
    assert "answers have 8.0 tokens in A and 4.0 in B" in compared.cautions[0]
    assert table(compared)["latency mean, ms"][5] == "different answers"
    assert table(compared)["TTFT mean, ms"][5] == "no difference seen"


def test_nothing_is_said_about_answers_whose_tokens_nobody_counted() -> None:
    made = records(120, ttft_s=0.3)
    for record in made:
        record.output_tokens = None
    uncounted = LoadPoint("concurrency 1", summarise(made, SLO(tpot_s=0.2)), {}, made)
    (compared,) = compare(run(simple(0.2)), run(uncounted))
    assert "does not count tokens" in compared.cautions[0]
    shown = table(compared)
    assert shown["latency mean, ms"][5] == "unknown lengths"
    assert shown["TTFT mean, ms"][5] == "A better"
    assert shown["goodput/s"][2] == shown["within the SLO, % of requests"][2] == "-"


# --- failures -----------------------------------------------------------------------------------


def test_a_run_that_failed_is_not_better() -> None:
    a, b = run(simple(0.2, count=40)), run(simple(0.1, count=40, failed=36))
    assert "B: concurrency 1: 36 of 40 requests failed" in cautions(a, b)
    (compared,) = compare(a, b)
    assert "0 of 40 requests failed in A and 36 of 40 in B" in compared.cautions[0]
    assert verdicts(compared) == {"requests failed"}
    assert table(compared)["requests answered"][1:3] == ["40 of 40", "4 of 40"]


def test_all_failed() -> None:
    (compared,) = compare(run(simple()), run(simple(failed=120)))
    assert table(compared)["TTFT mean, ms"][2:] == ["-", "-", "-", "requests failed"]


def test_one_failure_in_a_hundred_is_told_and_changes_no_verdict() -> None:
    (compared,) = compare(run(simple(0.2)), run(simple(0.3, failed=1)))
    assert "1 of 120 in B" in compared.cautions[0]
    assert "A better" in verdicts(compared)
    (compared,) = compare(run(simple(0.2)), run(simple(0.3, failed=2)))
    assert verdicts(compared) == {"requests failed"}


def test_warnings_of_each_run_are_carried_over() -> None:
    a, b = run(simple(count=25)), run(simple(count=40))
    b.environment["disturbed by"] = "a load of 2"
    found = cautions(a, b)
    assert "A: concurrency 1: p99 of 25 requests says little" in found
    assert "B: disturbed by a load of 2" in found


# --- pairs --------------------------------------------------------------------------------------


def test_loads_of_the_same_name_are_paired_in_their_order() -> None:
    a = run(simple(0.1), simple(0.2), point("concurrency 2", records(40, ttft_s=0.2)))
    b = run(simple(0.1), simple(0.4))
    first, second = compare(a, b)
    assert (first.load, second.load) == ("concurrency 1", "concurrency 1, time 2")
    assert table(first)["TTFT mean, ms"][3] == "1.000"
    assert float(table(second)["TTFT mean, ms"][3]) == pytest.approx(2, rel=0.02)
    assert "only A has concurrency 2" in cautions(a, b)
    assert "only A has concurrency 1, time 2, concurrency 2" in cautions(a, run(simple()))


def test_loads_that_cannot_be_paired() -> None:
    other = run(point("2/s poisson", records(40, ttft_s=0.2)))
    with pytest.raises(InvalidRequest, match="no load in common: A has concurrency 1, B has 2/s"):
        compare(run(simple()), other)
    with pytest.raises(InvalidRequest, match="B has none"):
        compare(run(simple()), run())


# --- the program --------------------------------------------------------------------------------


def test_the_program_compares_two_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(simple(0.2)).write(tmp_path / "a")
    run(simple(0.3), commit="def", workload="text, 16 words").write(tmp_path / "b")
    assert main(["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    for expected in ("## concurrency 1", "B / A", "def", "different requests"):
        assert expected in printed
    assert printed.index("not the same requests") < printed.index("B / A")
    assert not any(verdict in printed for verdict in VERDICTS)
    assert main(["--a", str(tmp_path / "none"), "--b", str(tmp_path / "b")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda p: p.pop("summary"), "was not written by", id="no summary"),
        pytest.param(lambda p: p.update(summary={}), "no number requests, failed", id="empty"),
        pytest.param(lambda p: p.update(summary=None), "no number requests, failed", id="null"),
        pytest.param(lambda p: p["summary"].pop("tiles_per_s"), "no number tiles_per_s", id="key"),
        pytest.param(lambda p: p["summary"].update(failed="x"), "no number failed", id="text"),
        pytest.param(lambda p: p["summary"].pop("lateness_p99_ms"), "lateness_p99_ms", id="late"),
        pytest.param(lambda p: p.update(records=[]), "no request was measured", id="no records"),
    ],
)
def test_a_damaged_file_is_refused(
    change: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run(simple()).write(tmp_path)
    values = json.loads(file.read_text())
    change(values["points"][0])  # type: ignore[operator]
    (tmp_path / "damaged.json").write_text(json.dumps(values))
    assert main(["--a", str(file), "--b", str(tmp_path / "damaged.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
