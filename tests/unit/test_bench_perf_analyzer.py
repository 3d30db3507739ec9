"""perf_analyzer's input and export, and what is said without the program."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from benchmarks.lengths import Lengths
from benchmarks.metrics import defined, gaps_s, latency_s, ttft_s
from benchmarks.perf_analyzer import command_line, input_data, main, read_export
from benchmarks.workload import Case, GeneratedWorkload
from internvl_triton.errors import InvalidRequest


def workload(*mix: str) -> GeneratedWorkload:
    return GeneratedWorkload(tuple(map(Case.parse, mix)), output_tokens=Lengths("9"))


def test_input_names_the_ensembles_tensors() -> None:
    asked = workload("2@32x32")
    data = input_data(asked, 3)["data"]
    assert len(data) == 3
    assert set(data[0]) == {"text_input", "sampling_parameters", "stream", "images"}
    assert json.loads(data[0]["sampling_parameters"]["content"][0])["max_tokens"] == 9
    assert data[1]["text_input"]["content"] == [asked.conversation(1).prompts[0]]
    raw, strings = base64.b64decode(data[2]["images"]["b64"]), []
    while raw:
        length = int.from_bytes(raw[:4], "little")
        strings.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    assert tuple(strings) == asked.conversation(2).images
    assert data[2]["images"]["shape"] == [2]


def test_what_it_cannot_be_asked() -> None:
    with pytest.raises(InvalidRequest, match="no clips"):
        input_data(workload("video=1"), 1)
    with pytest.raises(InvalidRequest, match="the same inputs in every request"):
        input_data(workload("text", "32x32"), 20)


def test_command_line() -> None:
    words = command_line(
        "loader --library-path x perf_analyzer",
        "h:1",
        data=Path("in.json"),
        export=Path("out.json"),
        requests=44,
        concurrency=4,
    )
    assert words[:4] == ["loader", "--library-path", "x", "perf_analyzer"]
    assert words[words.index("--request-count") + 1] == "44"
    assert {"--streaming", "--async"} <= set(words)


def export(*requests: tuple[int, list[int]], picture: bytes = b"") -> bytes:
    """As perf_analyzer writes it, with a picture's bytes as they are."""
    lines = [
        b'{"timestamp":%d,"request_inputs":{"images":"%s"},"response_timestamps":%s,"x":[{"a":""}]}'
        % (sent, picture, json.dumps(responses, separators=(",", ":")).encode())
        for sent, responses in requests
    ]
    head = b'{"experiments":[{"experiment":{"mode":"concurrency","value":2},"requests":['
    return head + b",".join(lines) + b'],"window_boundaries":[1,2]}],"version":"2.51.0"}'


@pytest.mark.parametrize("picture", [b"", b'\xff\xe2"\\u}]\x00\n"timestamp":\xed'])
def test_export_becomes_records(picture: bytes) -> None:
    requests = [
        (2_000_000_000, [2_500_000_000, 2_600_000_000]),
        (1_000_000_000, [1_200_000_000]),
        (3_000_000_000, []),
    ]
    first, second, third = read_export(export(*requests, picture=picture), output_tokens=2)
    assert (first.number, second.number) == (0, 1)
    assert third.error == "no response"
    assert defined(ttft_s, [first, second]) == pytest.approx([0.2, 0.5])
    assert defined(latency_s, [first, second]) == pytest.approx([0.2, 0.6])
    assert gaps_s([first, second]) == pytest.approx([0.1])


@pytest.mark.parametrize("text", [b"", b"{}", export(), export((1, [2])) * 2])
def test_what_is_no_export_of_one_run(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no export of one"):
        read_export(text, output_tokens=2)


def test_programs_that_are_not_there_or_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--program", "no-such-program", "--mix", "text"]) == 1
    assert "'no-such-program' is not on PATH" in capsys.readouterr().err
    assert main(["--program", "false", "--mix", "text", "--requests", "1"]) == 1
    assert "ended with exit code 1" in capsys.readouterr().err


def test_only_the_input_is_written(tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    assert main(["--write-input", str(file), "--mix", "32x32", "--requests", "2"]) == 0
    assert len(json.loads(file.read_text())["data"]) == 2
