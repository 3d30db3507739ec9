"""The program of load runs around a target that needs no server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, load, targets
from benchmarks.load_run import LoadRun
from benchmarks.records import RequestRecord
from benchmarks.turn import Turn


class Endpoint:
    """Answers at once; `failing` and `interrupted` say from which request on it does not."""

    def __init__(self, *, failing: int = 10**9, interrupted: int = 10**9) -> None:
        self.failing, self.interrupted = failing, interrupted
        self.options: dict[str, Any] = {}
        self.turns: list[Turn] = []

    def open(self, address: str, **options: Any) -> Endpoint:
        self.options = options
        return self

    async def model(self) -> str:
        return "stub"

    async def aclose(self) -> None: ...

    async def ask(self, turn: Turn, record: RequestRecord) -> str:
        self.turns.append(turn)
        if len(self.turns) > self.interrupted:
            raise KeyboardInterrupt
        record.sent_s = time.perf_counter()
        record.chunks_s = [record.sent_s + 0.010, record.sent_s + 0.012]
        record.ended_s = record.sent_s + 0.020
        record.output_tokens = turn.max_tokens
        record.error = "HTTP 500" if len(self.turns) > self.failing else ""
        return "an answer"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(endpoint: Endpoint, *options: str) -> tuple[int, Path]:
        for module in (load, targets):
            monkeypatch.setattr(module, "open_target", endpoint.open)
        folder = tmp_path / "report"
        words = ["--target", "http://stub/v1", "--mix", "text", "--no-overhead"]
        words += ["--output", str(folder), "--warm-up", "1", *options]
        return bench.main(words), folder

    return run


def test_limits_decide_the_goodput(run: Any) -> None:
    for limit, met in (("0.015", 1.0), ("0.005", 0.0)):
        options = ["--concurrency", "1", "--requests", "5", "--slo-ttft", limit]
        code, folder = run(Endpoint(), *options)
        assert code == 0
        (point,) = LoadRun.read(folder).points
        share = point.summary["goodput_per_s"] / point.summary["requests_per_s"]
        assert share == pytest.approx(met)


def test_what_the_options_say_reaches_the_target(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", "secret")
    endpoint = Endpoint()
    options = ["--api-key-variable", "ENDPOINT_KEY", "--endpoint-model", "m", "--timeout", "7"]
    options += ["--extra-body", '{"ignore_eos": true}', "--output-tokens", "5", "--let-stop"]
    run(endpoint, "--rate", "50", "--requests", "3", *options)
    assert endpoint.options == {
        "timeout_s": 7.0,
        "let_stop": True,
        "model": "m",
        "api_key": "secret",
        "extra": {"ignore_eos": True},
    }
    assert {turn.max_tokens for turn in endpoint.turns} == {5}


def test_a_ramp_and_a_duration_reach_the_load(run: Any) -> None:
    options = ["--rate", "40", "--arrivals", "constant", "--warm-up", "0"]
    _, folder = run(Endpoint(), *options, "--duration", "0.8", "--ramp", "0.4")
    (point,) = LoadRun.read(folder).points
    assert len(point.records) == pytest.approx(8 + 16, abs=4)  # 40 * 0.4 / 2, then 40 a second
    assert len(point.measured) == pytest.approx(16, abs=4)


def test_every_load_shows_the_server_other_words(run: Any) -> None:
    endpoint = Endpoint()
    run(endpoint, "--concurrency", "1", "2", "--requests", "4")
    prompts = [turn.messages[0]["content"][0]["text"] for turn in endpoint.turns]
    assert len(set(prompts)) == len(prompts) == 2 * (4 + 1)


def test_failures_are_counted_and_no_answer_at_all_is_an_exit_code(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = run(Endpoint(failing=3), "--concurrency", "1", "--requests", "5")
    assert code == 0
    assert LoadRun.read(folder).points[0].errors == {"HTTP 500": 3}
    code, folder = run(Endpoint(failing=0), "--concurrency", "1", "--requests", "5")
    assert code == 1
    assert "no request was answered" in capsys.readouterr().err
    assert "HTTP 500" in (folder / "report.html").read_text()


def test_finished_loads_survive_an_interruption(run: Any) -> None:
    endpoint = Endpoint(interrupted=8)
    code, folder = run(endpoint, "--concurrency", "1", "2", "--requests", "5")
    assert code == 130
    assert [point.load for point in LoadRun.read(folder).points] == ["concurrency 1"]
    assert (folder / "report.html").exists()


def test_nothing_is_asked_when_the_report_has_no_place(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("a file")
    endpoint = Endpoint()
    code, _ = run(endpoint, "--concurrency", "1")
    assert (code, endpoint.turns) == (1, [])
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--concurrency", "1", "--requests", "1", "--ramp", "60"],
        ["--rate", "0.001", "--duration", "0.01", "--warm-up", "5"],
    ],
)
def test_a_load_without_anything_measured_is_refused(
    run: Any, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(Endpoint(), *options)
    assert code == 1
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1", "--rate", "1"], "either --concurrency"),
        (["--jsonl", "a", "--images", "b"], "either --images or --jsonl"),
        (["--jsonl", "a", "--turns", "2"], "leave --turns out"),
        (["--timeout", "nan"], "--timeout is in seconds"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--slo-ttft", "nan"], "the limit of ttft_s is nan"),
        (["--ramp", "-5"], "ramp_s is -5.0"),
        (["--api-key-variable", "NO_SUCH_VARIABLE"], "has no NO_SUCH_VARIABLE"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = bench.main(options)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code in (1, 2)
    assert message in capsys.readouterr().err
