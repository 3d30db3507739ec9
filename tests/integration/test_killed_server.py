"""A server that is killed in the middle of answers leaves no process and no shared memory."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from internvl_triton.client import Client
from internvl_triton.errors import ServerUnavailable
from tests.integration.conftest import READY_TIMEOUT_S, Service, new_server
from tests.integration.processes import eventually, shared_memory_of

pytestmark = pytest.mark.triton

ENDLESS = {"max_tokens": 20_000, "min_tokens": 20_000}


def children_of(pid: int) -> list[int]:
    """Live processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


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
        models = children_of(server.pid)
        assert len(models) == 5  # two of them preprocess
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerUnavailable):
            for _ in streams[0]:
                pass
        assert eventually(lambda: not any(map(is_alive, models)), timeout_s=30)
        ours = set(shared_memory_of(os.getpid())) - before
        assert not ours
