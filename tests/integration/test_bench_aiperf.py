"""aiperf itself against the gateway, where `make bench-aiperf` has installed it."""

from __future__ import annotations

import re

import httpx2
import pytest

from benchmarks.aiperf import ENVIRONMENT, main
from benchmarks.running_gateway import running_gateway
from tests.integration.conftest import Service

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not (ENVIRONMENT / "bin" / "aiperf").exists(),
        reason="aiperf is not installed (1.2 GB): see `make bench-aiperf`",
    ),
]


def test_its_numbers_beside_ours(qwen2: Service, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests=4", "--concurrency=2", "--output-tokens=8", "--mix", "448x448"]
    with running_gateway(qwen2.server.grpc_url) as gateway:
        tokenizer = f"--tokenizer={qwen2.checkpoint}"
        assert main([f"--url={gateway.url}", tokenizer, *options]) == 0
        metrics = httpx2.get(gateway.url.removesuffix("/v1") + "/metrics").text
    found = re.findall(r'^internvl_gateway_requests_total\{code="(\d+)"\} (\S+)', metrics, re.M)
    assert found == [("200", "12.0")]  # four and two to warm up, by each of us
    (prompt,) = re.findall(r'tokens_total\{kind="prompt"\} (\S+)', metrics)
    assert float(prompt) > 12 * 256  # so the pictures went along
    assert "ttft mean ms" in capsys.readouterr().out
