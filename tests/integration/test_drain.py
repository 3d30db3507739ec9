"""A stop of the service: running requests finish, new ones are refused, and it does not last."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing

import grpc
import pytest

from build.engines import build_engines
from internvl_triton.answer import Answer
from internvl_triton.client import Client
from internvl_triton.errors import RequestTimedOut, ServerError, ServerUnavailable
from internvl_triton.random_checkpoint import write_random_checkpoint
from tests.integration.conftest import tiny_service_config
from tests.integration.processes import eventually, processes_naming, shared_memory_of
from tests.integration.served import Served, serve

pytestmark = pytest.mark.triton

TOKENS = 5000
Start = Callable[[float], AbstractContextManager[Served]]
LONG = {"max_tokens": TOKENS, "min_tokens": TOKENS}
ENDLESS = {"max_tokens": 20_000, "min_tokens": 20_000}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a service that gives running requests so many seconds."""
    root = tmp_path_factory.mktemp("drain")
    checkpoint = write_random_checkpoint(root / "tiny", tiny_service_config("qwen2"))
    build_engines(str(checkpoint), artifacts_dir=root, progress=False)
    return lambda drain_s: serve(checkpoint, root, f"--drain-timeout={drain_s}")


def preprocessed(served: Served) -> int:
    """Requests that the first step has let through."""
    stats = json.loads(served.get("/v2/models/preprocessing/stats"))
    count: int = stats["model_stats"][0]["inference_stats"]["success"]["count"]
    return count


def assert_nothing_is_left(served: Served) -> None:
    assert processes_naming(served.repository) == []
    assert shared_memory_of(served.process.pid) == []


def test_running_requests_finish_and_new_ones_are_refused(start: Start) -> None:
    with start(300) as served, Client(served.url, timeout_s=300) as client:
        assert served.is_ready()
        with ThreadPoolExecutor(1) as pool:
            streamed = Answer()
            chunks = client.stream("A stream?", answer=streamed, **LONG)
            next(chunks)
            whole = pool.submit(client.generate, "In one piece?", **LONG)
            assert eventually(lambda: preprocessed(served) == 2)  # both are under way
            served.process.send_signal(signal.SIGTERM)
            served.read_until("stopping")
            assert eventually(lambda: not served.is_ready())
            assert served.status("/v2/health/ready") != 200

            with pytest.raises(ServerUnavailable, match="starting or stopping"):
                client.generate("Too late?", max_tokens=1)
            with Client(served.url) as another, pytest.raises(ServerUnavailable):
                another.generate("Too late?", max_tokens=1)
            # Otherwise this test has come too late to prove anything.
            assert not whole.done(), whole.result()

            for _ in chunks:
                pass
            assert streamed.num_output_tokens == TOKENS
            assert whole.result().num_output_tokens == TOKENS
        assert served.process.wait(60) == 0
        assert "stopped" in served.read_rest()
        assert_nothing_is_left(served)


def test_what_runs_too_long_is_ended(start: Start) -> None:
    with start(1) as served, Client(served.url, timeout_s=300) as client:
        with closing(client.stream("For ever?", **ENDLESS)) as chunks:
            next(chunks)
            served.process.send_signal(signal.SIGTERM)
            with pytest.raises(ServerError) as failure:
                for _ in chunks:
                    pass
            assert not isinstance(failure.value, RequestTimedOut)
        assert served.process.wait(60) == 0
        assert "the time is over" in served.read_rest()
        assert_nothing_is_left(served)


def test_a_second_interrupt_ends_it_at_once(start: Start) -> None:
    with start(10_000) as served, Client(served.url, timeout_s=10_000) as client:
        with closing(client.stream("For ever?", **ENDLESS)) as chunks:
            next(chunks)
            served.process.send_signal(signal.SIGINT)
            served.read_until("stopping")
            next(chunks)
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(60) == 0
        assert "ending at once" in served.read_rest()
        assert_nothing_is_left(served)


def test_only_the_launcher_may_unload_models(start: Start) -> None:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with start(1) as served:
        assert served.status("/v2/repository/models/internvl/unload", b"{}") == 403
        assert served.status("/v2/repository/index", b"{}") == 403
        with (
            closing(InferenceServerClient(served.url)) as client,
            pytest.raises((InferenceServerException, grpc.RpcError), match="restricted"),
        ):
            client.unload_model("internvl")
        assert served.is_ready()
