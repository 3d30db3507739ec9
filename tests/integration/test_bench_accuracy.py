"""The accuracy benchmark against a running service whose answers are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import main, read_results
from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture

pytestmark = pytest.mark.triton


def test_known_answers_score_full_marks_and_failures_are_wrong(
    qwen2: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = encoded(picture(448, 448))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    known = qwen2.client.generate("What is this?", images=[data], max_tokens=6).text
    lines = [
        {"question": "What is this?", "image": "a.png", "answer": ["no", known], "kind": "known"},
        {"question": "What is this?", "image": "a.png", "answer": "something", "kind": "unknown"},
        {"question": "What is this?", "image": "broken.png", "answer": known, "kind": "broken"},
    ]
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--server", qwen2.server.grpc_url, "--jsonl", str(tmp_path / "vqa.jsonl")]
    output = str(tmp_path / "out.jsonl")
    assert main([*options, "--max-tokens", "6", "--output", output]) == 0
    run, (right, wrong, failed) = read_results(tmp_path / "out.jsonl")
    assert run["model"] == qwen2.checkpoint.name
    assert (right.given, right.exact, right.anls) == (known, True, 1.0)
    assert (wrong.given, wrong.exact) == (known, False)
    assert not failed.exact
    assert "InvalidRequest" in failed.error
    printed = capsys.readouterr().out
    assert "failed 1x, counted as wrong: InvalidRequest" in printed
    assert main([*options, "--max-tokens", "6", "--compare", output]) == 0
    assert "McNemar" in capsys.readouterr().out
