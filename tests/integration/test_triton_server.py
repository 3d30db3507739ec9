"""The launcher with the real tritonserver and a Python model of ten lines."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from internvl_triton import triton_server
from internvl_triton.errors import PortInUse, ServerStartFailed
from internvl_triton.triton_server import TritonServer, find_free_port
from tests.integration.processes import children_of, eventually, shared_memory_of

pytestmark = pytest.mark.triton

CONFIG = """\
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ADD_ONE = """\
import sys
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        print("prefix:", sys.prefix, flush=True)

    def execute(self, requests):
        xs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)]) for x in xs]
"""
NO_WEIGHTS = """\
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("the weights are missing")
"""
# Starts a server and says so, then waits to be killed.
LAUNCHER = """\
import sys, time
from pathlib import Path
from internvl_triton.triton_server import TritonServer
folder, *ports = sys.argv[1:]
http_port, grpc_port, metrics_port = map(int, ports)
server = TritonServer(
    Path(folder) / "repository",
    http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port,
    log_path=Path(folder) / "server.log",
)
server.start()
server.wait_ready(timeout_s=60)
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the code of a model into a model repository and returns the repository."""

    def write(code: str) -> Path:
        version = tmp_path / "repository" / "model" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(code)
        (version.parent / "config.pbtxt").write_text(CONFIG)
        return tmp_path / "repository"

    return write


@pytest.fixture
def make_server(
    write_model: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[..., TritonServer]]:
    """Makes a server for one model. Every server is stopped at the end of the test."""
    servers = []

    def make(code: str = ADD_ONE, **options: int) -> TritonServer:
        ports = {name: find_free_port() for name in ("http_port", "grpc_port", "metrics_port")}
        log_path = tmp_path / "server.log"
        server = TritonServer(write_model(code), log_path=log_path, **{**ports, **options})
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def group_members(group: int) -> list[int]:
    """Process ids in a process group, without zombies."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


def infer(server: TritonServer, values: list[int]) -> list[int]:
    tensor = {"name": "x", "datatype": "INT32", "shape": [len(values)], "data": values}
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/model/infer",
        data=json.dumps({"inputs": [tensor]}).encode(),
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: list[int] = json.load(response)["outputs"][0]["data"]
        return answer


SUCCESS = b'nv_inference_request_success{model="model",version="1"} 1'


def metrics_of(server: TritonServer) -> bytes:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as metrics:
        return bytes(metrics.read())


def test_serves_in_this_environment_and_leaves_nothing(
    make_server: Callable[..., TritonServer], tmp_path: Path
) -> None:
    with make_server() as server:
        server.wait_ready(timeout_s=60)
        assert infer(server, [1, 41]) == [2, 42]
        assert eventually(
            lambda: SUCCESS in metrics_of(server), timeout_s=10
        )  # counted after the response
        group = server.pid
        assert group is not None
        assert len(group_members(group)) == 3  # supervisor, server and one stub
        assert len(shared_memory_of(os.getpid())) == 1
        backend = _backend_folder(tmp_path)
        assert backend.is_dir()
    assert server.exit_code == 0
    assert group_members(group) == []
    assert shared_memory_of(os.getpid()) == []
    assert not backend.exists()
    assert f"prefix: {sys.prefix}\n" in (tmp_path / "server.log").read_text()


def test_can_be_started_again_on_the_same_ports(
    make_server: Callable[..., TritonServer], tmp_path: Path
) -> None:
    server = make_server()
    for _ in range(2):
        with server:
            server.wait_ready(timeout_s=60)
            assert infer(server, [1]) == [2]
    assert "prefix: " in (tmp_path / "server.previous.log").read_text()


def test_busy_port_is_refused(make_server: Callable[..., TritonServer]) -> None:
    with make_server() as server:
        server.wait_ready(timeout_s=60)
        second = TritonServer(
            server.model_repository,
            http_port=find_free_port(),
            grpc_port=server.grpc_port,
            metrics_port=find_free_port(),
        )
        with pytest.raises(PortInUse, match=f"gRPC port {server.grpc_port}"):
            second.start()
        assert infer(server, [1]) == [2]


def test_model_that_fails_to_load_is_reported_at_once(
    make_server: Callable[..., TritonServer],
) -> None:
    started = time.monotonic()
    with make_server(NO_WEIGHTS) as server:
        with pytest.raises(ServerStartFailed, match="the weights are missing") as info:
            server.wait_ready(timeout_s=60)
        assert "exit code 1" in str(info.value)
    assert time.monotonic() - started < 30
    assert server.exit_code == 1
    assert shared_memory_of(os.getpid()) == []


def test_slow_model_is_reported_when_the_time_is_over(
    make_server: Callable[..., TritonServer],
) -> None:
    slow = "import time\n" + ADD_ONE.replace("print(", "time.sleep(60); print(")
    with make_server(slow, exit_timeout_s=0) as server:
        with pytest.raises(ServerStartFailed, match=r"was not ready after 0\.5 s"):
            server.wait_ready(timeout_s=0.5)
        group = server.pid
        assert group is not None
    assert group_members(group) == []
    assert shared_memory_of(os.getpid()) == []


def test_stubs_of_a_crashed_server_are_cleared_away(
    make_server: Callable[..., TritonServer],
) -> None:
    with make_server() as server:
        server.wait_ready(timeout_s=60)
        group = server.pid
        assert group is not None
        (tritonserver,) = children_of(group)
        os.kill(tritonserver, signal.SIGSEGV)
        assert server.wait(timeout_s=20) == -signal.SIGSEGV
        assert not server.is_running()
    assert server.exit_code == -signal.SIGSEGV
    assert group_members(group) == []
    assert shared_memory_of(os.getpid()) == []


def test_server_that_does_not_end_is_killed(
    make_server: Callable[..., TritonServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_server, "KILL_GRACE_S", 0.5)
    with make_server(exit_timeout_s=0) as server:
        server.wait_ready(timeout_s=60)
        group = server.pid
        assert group is not None
        (tritonserver,) = children_of(group)
        # Deaf to SIGTERM, like a server that an open stream holds.
        os.kill(tritonserver, signal.SIGSTOP)
    assert server.exit_code == -signal.SIGKILL
    assert group_members(group) == []
    assert shared_memory_of(os.getpid()) == []


def test_a_killed_supervisor_leaves_nothing(make_server: Callable[..., TritonServer]) -> None:
    with make_server() as server:
        server.wait_ready(timeout_s=60)
        group = server.pid
        assert group is not None
        os.kill(group, signal.SIGKILL)
        assert eventually(lambda: group_members(group) == [], timeout_s=30)
    assert server.exit_code == -signal.SIGKILL
    assert shared_memory_of(os.getpid()) == []


def test_no_server_outlives_its_launcher(
    write_model: Callable[[str], Path], tmp_path: Path
) -> None:
    write_model(ADD_ONE)
    ports = [str(find_free_port()) for _ in range(3)]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), *ports],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # its temporary folder stays behind
        stdout=subprocess.PIPE,
        text=True,
    )
    with launcher:
        assert launcher.stdout is not None
        group = int(launcher.stdout.readline())
        assert len(group_members(group)) == 3
        launcher.kill()
    assert eventually(lambda: group_members(group) == [], timeout_s=10)
    assert eventually(lambda: shared_memory_of(launcher.pid) == [], timeout_s=10)


def _backend_folder(tmp_path: Path) -> Path:
    """The temporary folder of the running server, as its log names it."""
    log = (tmp_path / "server.log").read_text()
    library = next(word for word in log.split() if word.endswith("/libtriton_python.so"))
    return Path(library).parent
