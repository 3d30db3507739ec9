"""The README's commands and code, run as they stand against a running service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Service

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def demo(start_service: Callable[[str], Service]) -> Service:
    return start_service("demo")


def test_python_block(demo: Service, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It prints what the README says."""
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in blocks("python") if "internvl_triton.client" in block]
    program = block.replace("127.0.0.1:8001", demo.server.grpc_url)
    assert program != block
    exec(compile(program, "README.md", "exec"), {})
    (said,) = blocks("text")
    assert capsys.readouterr().out == said


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_command(demo: Service) -> None:
    (block,) = [block for block in blocks("sh") if "/generate" in block]
    command = block.replace("localhost:8000", demo.server.http_url)
    assert command != block
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, timeout=120, check=True, cwd=ROOT
    )
    answer = json.loads(done.stdout.decode(errors="replace"))
    assert answer["text_output"] == "A red circle and a blue square and the number 42."
    assert answer["error"] == ""
