"""aiperf itself against the gateway; it is installed if it is not there."""

from __future__ import annotations

import re

import httpx2
import pytest

from benchmarks.aiperf import ENVIRONMENT, ensure_aiperf, main
from benchmarks.running_gateway import running_gateway
from internvl_triton.errors import BuildFailed
from tests.integration.conftest import Service

pytestmark = pytest.mark.triton


@pytest.mark.timeout(900)  # the first time installs 1.2 GB
def test_its_numbers_beside_ours(qwen2: Service, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ensure_aiperf(ENVIRONMENT)
    except BuildFailed as error:
        pytest.skip(str(error))
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
