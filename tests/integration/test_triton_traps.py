"""What tritonserver 2.51 does that one would not expect, each with the test that keeps us out.

| trap | test |
|---|---|
| a running step of an ensemble never sees the client's cancel | test_ensemble_cancel.py |
| an error behind the language model leaks the ensemble's request | here: refusals |
| SIGTERM silences an ensemble with a step behind the language model | test_drain.py |
| an idle open stream keeps the process alive after SIGTERM | here: idle stream |
| custom metrics in two threads at once end the server | unit/test_triton_traps.py: one lock |
| an error and the end of a stream, sent apart, are a use-after-free | here: status codes; unit |
| a dead stub is never restarted, and the server stays ready | test_faults.py |
| a stub killed while it holds the lock of its shared memory aborts the server | test_faults.py |
| a stub that asks its killed server something waits for ever | test_killed_server.py |
| NumPy 2 in the stubs | unit/test_triton_traps.py; unit/test_dependencies.py |
| two instances behind the language model reorder its tokens | unit/test_tensor_contract.py |
| the last token may come with the end of the stream | test_ensemble_parity.py: every token counts |
| 0 rows into a batching model are refused | test_ensemble_http.py; unit/test_tensor_contract.py |
| the response cache hashes tiles byte by byte | unit/test_triton_traps.py |
| responses carry no parameters, so errors are tensors | here: refusals |
| a decoupled model's queue looks empty, so its limits do nothing | here: refusals |
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from build.engines import build_engines
from internvl_triton import tensor_contract as contract
from internvl_triton.client import Client, request_tensors
from internvl_triton.errors import Overloaded
from internvl_triton.grpc_transport import GrpcTransport, stop_inputs
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.triton_server import TritonServer
from tests.integration.conftest import READY_TIMEOUT_S, new_server, tiny_service_config
from tests.integration.processes import eventually, processes_naming

pytestmark = pytest.mark.triton

LONG = {"max_tokens": 20000, "min_tokens": 20000}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a service that answers one request at a time, while one more may wait."""
    root = tmp_path_factory.mktemp("traps")
    path = write_random_checkpoint(root / "tiny", tiny_service_config("qwen2"))
    limits = {"max_batch_size": 1, "max_queue_size": 1}
    build_engines(str(path), artifacts_dir=root, limits=limits, progress=False)
    return path


@pytest.fixture
def server(checkpoint: Path) -> Iterator[TritonServer]:
    with new_server(checkpoint, checkpoint.parent) as server:
        server.wait_ready(READY_TIMEOUT_S)
        yield server
    assert processes_naming(server.model_repository) == []


def errors_of(url: str, timeout_s: float) -> list[str]:
    """The `error` of every response to a long request that has this timeout on the server."""

    async def run() -> list[str]:
        transport = GrpcTransport(url)
        # A server's deadline that is far shorter than the client's.
        with mock.patch.object(asyncio.get_running_loop(), "call_later"):
            tensors = request_tensors("Hi", (), (), LONG, True)
            errors = []
            async for response in transport.stream(tensors, "late", timeout_s):
                errors.append(response[contract.ERROR.name].item().decode())
        await transport.close()
        return errors

    return asyncio.run(run())


def test_refusals_behind_the_language_model_leak_nothing(server: TritonServer) -> None:
    with Client(server.grpc_url, timeout_s=300) as client:
        late = errors_of(server.grpc_url, timeout_s=0.5)
        assert late[-1].startswith("timed out: no complete answer within 0.5 s")
        assert not any(late[:-1])

        with ThreadPoolExecutor(1) as pool, closing(client.stream("One runs", **LONG)) as running:
            next(running)
            late = errors_of(server.grpc_url, timeout_s=0.5)  # while it waits
            assert len(late) == 1
            assert late[0].startswith("timed out: ")
            waiting = pool.submit(client.generate, "One waits", max_tokens=1)
            assert eventually(lambda: somebody_waits(server), timeout_s=60)
            with pytest.raises(Overloaded, match=r"1 are waiting .*try again later"):
                client.generate("Nobody else", max_tokens=1)
            assert not waiting.done()
        assert waiting.result().num_output_tokens == 1
        assert client.generate("Free again", max_tokens=1).num_output_tokens == 1
    server.stop()
    assert server.exit_code == 0, "a request was left behind: see the end of the server's log"


def somebody_waits(server: TritonServer) -> bool:
    _, page = server.request("GET", "/metrics", port=server.metrics_port)
    return b'internvl_requests_waiting{model="tensorrt_llm"} 1' in page


def test_an_idle_stream_does_not_keep_the_server(checkpoint: Path) -> None:
    from tritonclient.grpc import InferenceServerClient

    server = new_server(checkpoint, checkpoint.parent)
    server.exit_timeout_s = 1
    with server:
        server.wait_ready(READY_TIMEOUT_S)
        with closing(InferenceServerClient(server.grpc_url)) as client:
            responses: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: responses.put(error))
            client.async_stream_infer(contract.TENSORRT_LLM.name, [], request_id="1")
            assert responses.get(timeout=60) is not None  # the stream is open, and idle now
            server.stop()
            client.stop_stream(cancel_requests=True)
    assert processes_naming(server.model_repository) == []


def test_errors_with_status_codes_do_not_end_the_server(server: TritonServer) -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput

    inputs = []
    for name, value in {**stop_inputs(), "input_ids": np.zeros((2, 1), np.int32)}.items():
        rows = np.repeat(value[:1], 2, axis=0)
        rows = np.zeros_like(rows)  # not a stop, and two sequences in one request: refused
        item = InferInput(name, list(rows.shape), "BOOL" if rows.dtype == np.bool_ else "INT32")
        item.set_data_from_numpy(rows)
        inputs.append(item)
    for _ in range(20):
        with closing(InferenceServerClient(server.grpc_url)) as client:
            responses: queue.Queue[Any] = queue.Queue()
            client.start_stream(
                lambda result, error, responses=responses: responses.put(error),
                headers={"triton_grpc_error": "true"},
            )
            client.async_stream_infer(contract.TENSORRT_LLM.name, inputs, request_id="1")
            assert responses.get(timeout=60) is not None
            client.stop_stream()
    assert server.is_ready()
    assert server.is_running()
