"""The README's commands and code, run as they stand against a running service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Service

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_python_block(qwen2: Service, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    # The other one asks the gateway: test_gateway.py runs it.
    (block,) = [block for block in blocks("python") if "internvl_triton.client" in block]
    program = block.replace("127.0.0.1:8001", qwen2.server.grpc_url)
    assert program != block
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_command(qwen2: Service) -> None:
    (block,) = [block for block in blocks("sh") if "/generate" in block]
    command = block.replace("localhost:8000", qwen2.server.http_url)
    assert command != block
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, timeout=120, check=True, cwd=ROOT
    )
    answer = json.loads(done.stdout.decode(errors="replace"))
    assert len(answer["output_ids"]) == 32
    assert answer["num_input_tokens"] > 13 * 256
    assert answer["error"] == ""
