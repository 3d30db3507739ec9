"""aiperf's input, command line and summary, and what is said when it fails."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from benchmarks.aiperf import command_line, ensure_aiperf, input_lines, main, run_aiperf
from benchmarks.aiperf import side_by_side as shown
from benchmarks.lengths import Lengths
from benchmarks.records import RequestRecord
from benchmarks.workload import Case, GeneratedWorkload
from internvl_triton.errors import BuildFailed, InvalidRequest


def workload(*mix: str) -> GeneratedWorkload:
    return GeneratedWorkload(tuple(map(Case.parse, mix)), output_tokens=Lengths("9"))


def test_input_holds_the_workloads_pictures() -> None:
    asked = workload("2@32x32", "text")
    lines = [json.loads(line) for line in input_lines(asked, 20)]
    assert len(lines) == 20
    for number, line in enumerate(lines):
        conversation = asked.conversation(number)
        assert line["text"] == conversation.prompts[0]
        pictures = [base64.b64decode(url.partition(",")[2]) for url in line.get("images", ())]
        assert tuple(pictures) == conversation.images
    assert {len(line.get("images", ())) for line in lines} == {0, 2}
    with pytest.raises(InvalidRequest, match="no clips"):
        input_lines(workload("video=1"), 1)


def test_command_line() -> None:
    words = command_line(
        "aiperf",
        "http://h:1/v1",
        "m",
        tokenizer="t",
        data=Path("in.jsonl"),
        output=Path("out"),
        requests=40,
        warm_up=4,
        concurrency=4,
        tokens=9,
    )
    assert words[:2] == ["aiperf", "profile"]
    assert words[words.index("--url") + 1] == "http://h:1"  # aiperf adds /v1/chat/completions
    extra = json.loads(words[words.index("--extra-inputs") + 1])
    assert (extra["max_tokens"], extra["min_tokens"]) == (9, 9)
    assert {"--streaming", "--use-server-token-count"} <= set(words)


def fake(folder: Path, summary: dict[str, object] | None) -> list[str]:
    """A program that prints 30 lines and leaves aiperf's export, if there is a summary."""
    write = (
        ""
        if summary is None
        else f"(o / 'profile_export_aiperf.json').write_text({json.dumps(summary)!r})"
    )
    code = (
        f"import pathlib; o = pathlib.Path({str(folder)!r}); o.mkdir(exist_ok=True)\n"
        f"for k in range(30): print('line', k)\n{write}"
    )
    return [sys.executable, "-c", code]


def test_its_summary_beside_ours(tmp_path: Path) -> None:
    summary = {
        "request_throughput": {"unit": "requests/sec", "avg": 2.0},
        "time_to_first_token": {"unit": "ms", "avg": 100.0, "p50": 200.0, "p99": 1.0},
    }
    theirs = run_aiperf(fake(tmp_path, summary), tmp_path)
    record = RequestRecord(0, sent_s=0, chunks_s=[0.1, 0.5], ended_s=0.5, output_tokens=2)
    head, *rows = shown(theirs, [record])
    assert head[1:] == ["aiperf", "ours", "ours / theirs"]
    assert rows[0] == ["requests/s", "2", "2", "1.000"]
    assert rows[1] == ["ttft mean ms", "100", "100", "1.000"]
    assert rows[2] == ["ttft p50 ms", "200", "100", "0.500"]
    assert len(rows) == 4  # what aiperf did not say is left out


def test_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BuildFailed, match=r"exit code 0(?s:.*)line 29") as told:
        run_aiperf(fake(tmp_path, None), tmp_path)
    assert "line 5\n" not in str(told.value)
    failed = {"error_request_count": {"avg": 3.0}, "error_summary": ["HTTP 400"]}
    with pytest.raises(BuildFailed, match=r"3 of aiperf's requests failed: \['HTTP 400'\]"):
        run_aiperf(fake(tmp_path, failed), tmp_path)
    assert main(["--model", "no-such-model"]) == 1
    assert "is no directory" in capsys.readouterr().err


def test_an_environment_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "aiperf"
    program.parent.mkdir()
    program.touch()
    assert ensure_aiperf(tmp_path) == program
