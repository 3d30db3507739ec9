"""A server that is killed in the middle of answers leaves no process and no shared memory."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, closing

import pytest

from internvl_triton.client import Client
from internvl_triton.errors import ServerUnavailable
from tests.integration.conftest import READY_TIMEOUT_S, Service, new_server
from tests.integration.processes import children_of, is_alive, shared_memory_of

pytestmark = pytest.mark.triton

ENDLESS = {"max_tokens": 20_000, "min_tokens": 20_000}


def test_a_killed_server_takes_its_models_with_it(qwen2: Service) -> None:
    before = set(shared_memory_of(os.getpid()))
    server = new_server(qwen2.checkpoint, qwen2.artifacts_dir)
    with ExitStack() as stack:
        stack.callback(server.stop)
        server.start()
        server.wait_ready(READY_TIMEOUT_S)
        client = stack.enter_context(Client(server.grpc_url, timeout_s=60))
        streams = [client.stream(f"Question {number}?", **ENDLESS) for number in range(8)]
        for stream in streams:
            stack.enter_context(closing(stream))
            next(stream)
        assert server.pid is not None
        (tritonserver,) = children_of(server.pid)
        models = children_of(tritonserver)
        assert len(models) == 5  # two of them preprocess
        os.kill(tritonserver, signal.SIGKILL)
        with pytest.raises(ServerUnavailable):
            for _ in streams[0]:
                pass
        assert server.wait(timeout_s=60) == -signal.SIGKILL
        assert not any(map(is_alive, models))
        ours = set(shared_memory_of(os.getpid())) - before
        assert not ours
