"""Processes that are killed or hang while the service answers."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from build.engines import build_engines
from internvl_triton.canary import Canary, TritonView
from internvl_triton.client import Client
from internvl_triton.errors import RequestTimedOut, ServerError, ServerUnavailable
from internvl_triton.random_checkpoint import write_random_checkpoint
from tests.integration.conftest import READY_TIMEOUT_S, new_server, tiny_service_config
from tests.integration.pictures import encoded, picture
from tests.integration.processes import (
    children_of,
    eventually,
    is_alive,
    processes_naming,
    shared_memory_of,
)
from tests.integration.served import Served, serve

pytestmark = pytest.mark.triton

ENDLESS = {"max_tokens": 20_000, "min_tokens": 20_000}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    path = write_random_checkpoint(root / "tiny", tiny_service_config("qwen2"))
    build_engines(str(path), artifacts_dir=root, progress=False)
    return path


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    """One service for all these tests: each leaves it serving again."""
    with serve(checkpoint, checkpoint.parent) as service:
        yield service
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(120) == 0
        assert processes_naming(service.repository) == []
        assert shared_memory_of(service.process.pid) == []


def models_of(served: Served) -> dict[int, str]:
    """Process id -> model of the service's Python models."""
    (supervisor,) = children_of(served.process.pid)
    (tritonserver,) = children_of(supervisor)
    found = {}
    for pid in children_of(tritonserver):
        model_file = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1]
        found[pid] = Path(model_file).parent.parent.name
    return found


def victims(served: Served, name: str) -> list[int]:
    if name == "tritonserver":
        return children_of(children_of(served.process.pid)[0])
    return [pid for pid, model in models_of(served).items() if model == name]


@pytest.mark.parametrize("name", ["tensorrt_llm", "vision_encoder", "tritonserver"])
def test_a_killed_process_fails_requests_and_the_service_comes_back(
    served: Served, name: str
) -> None:
    image = [encoded(picture(300, 300))]
    before = models_of(served)
    with ThreadPoolExecutor(1) as pool, Client(served.url, timeout_s=300) as client:
        answer = client.generate("What is it?", images=image, max_tokens=8)
        with closing(client.stream("For ever?", **ENDLESS)) as chunks:
            next(chunks)
            whole = pool.submit(client.generate, "And in one piece?", **ENDLESS)
            os.kill(victims(served, name)[0], signal.SIGKILL)
            assert eventually(lambda: not served.is_ready(), timeout_s=60)
            for failing in (lambda: list(chunks), whole.result):
                with pytest.raises(ServerError) as failure:
                    failing()
                assert not isinstance(failure.value, RequestTimedOut)
        told = served.read_until("starting Triton again")
        # A process that is killed while it holds the lock of the memory that it shares with the
        # server: the backend's exception ends the server before the launcher does (signal 6).
        died = (f"a process of {name} has died", "tritonserver ended with signal 6")
        reasons = ("tritonserver ended with signal 9",) if name == "tritonserver" else died
        assert any(reason in told for reason in reasons), told
        served.read_until("serving")
        assert served.is_ready()
    with Client(served.url, timeout_s=300) as client:

        def is_reached() -> bool:
            try:
                return bool(client.generate("Hi", max_tokens=1))
            except ServerUnavailable:  # gRPC's pause before it tries the same address again
                return False

        assert eventually(is_reached, timeout_s=60)
        assert client.generate("What is it?", images=image, max_tokens=8).text == answer.text
    after = models_of(served)
    assert sorted(after.values()) == sorted(before.values())
    assert not any(map(is_alive, before))
    assert len(shared_memory_of(served.process.pid)) == len(after)


def test_the_canary_sees_a_model_that_hangs(checkpoint: Path) -> None:
    with new_server(checkpoint, checkpoint.parent) as server:
        server.wait_ready(READY_TIMEOUT_S)
        canary = Canary(TritonView(server), interval_s=0.2, timeout_s=60)
        success = b'nv_inference_request_success{model="internvl",version="1"} '

        def questions() -> int:
            _, page = server.request("GET", "/metrics", port=server.metrics_port)
            return int(page.partition(success)[2].split(b"\n")[0] or 0)

        def fine_after(count: int) -> bool:
            assert canary.problem() is None
            return questions() >= count

        assert eventually(lambda: fine_after(3), timeout_s=120)

        hasty = Canary(TritonView(server), interval_s=0.2, timeout_s=5)
        (language_model,) = [
            pid for pid, model in server.model_processes().items() if model == "tensorrt_llm"
        ]
        os.kill(language_model, signal.SIGSTOP)
        problems: list[str | None] = [None]

        def has_problem() -> bool:
            problems.append(hasty.problem())
            return problems[-1] is not None

        assert eventually(has_problem, timeout_s=120)
        assert problems[-1] is not None
        # Triton may notice it as well, and then fails the question.
        assert re.search(
            "nobody got an answer for 5 s|a question failed: .*not healthy", problems[-1]
        )
        server.kill()
    assert processes_naming(f"--grpc-port={server.grpc_port}") == []
    assert not any(server._shared_memory_prefix in name for name in shared_memory_of(os.getpid()))
