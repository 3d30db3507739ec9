"""The parts of the launcher that need no server."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_triton import triton_server
from internvl_triton.errors import PortInUse, ServerCrashed, ServerStartFailed
from internvl_triton.triton_server import TritonServer, check_ports, find_free_port, log_reasons


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_free_port_can_be_listened_on() -> None:
    check_ports({"HTTP": find_free_port()})


def test_busy_port_is_named_with_the_option_that_changes_it(busy_port: int) -> None:
    with pytest.raises(
        PortInUse, match=rf"gRPC port {busy_port} on 127\.0\.0\.1 is in use"
    ) as info:
        check_ports({"HTTP": find_free_port(), "gRPC": busy_port})
    assert "--grpc-port" in str(info.value)
    assert "GRPC_PORT=<port>" in str(info.value)


def test_port_busy_on_all_addresses_is_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(PortInUse):
        check_ports({"HTTP": listener.getsockname()[1]})


def test_same_port_twice_is_refused() -> None:
    port = find_free_port()
    with pytest.raises(PortInUse, match=f"port {port} is given for both HTTP and metrics"):
        check_ports({"HTTP": port, "metrics": port})


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ServerStartFailed, match=f"HTTP port is {port}, but ports go from 1"):
        check_ports({"HTTP": port})


def test_foreign_host_is_refused() -> None:
    with pytest.raises(ServerStartFailed, match=r"cannot listen on HTTP port \d+ of 192\.0\.2\.1"):
        check_ports({"HTTP": find_free_port()}, host="192.0.2.1")  # reserved for documentation


def test_log_reasons_skip_tables_and_information() -> None:
    log = """\
I1123 18:07:05.219 1 model_lifecycle.cc:472] "loading: broken:1"
E1123 18:07:05.396 1 server.cc:241] "CudaDriverHelper has not been initialized."
IndexError: list index out of range
E1123 18:07:05.609 1 model_lifecycle.cc:642] "failed to load 'broken' version 1"
+--------+---------+
| Model  | Version |
+--------+---------+
error: creating server: Internal - failed to load all models
"""
    assert log_reasons(log) == [
        "IndexError: list index out of range",
        "E1123 18:07:05.609 1 model_lifecycle.cc:642] \"failed to load 'broken' version 1\"",
        "error: creating server: Internal - failed to load all models",
    ]
    assert log_reasons(log, limit=1) == log_reasons(log)[-1:]
    assert log_reasons("tritonserver: option 'x' is wrong\nUsage: tritonserver\n  --help\n") == [
        "tritonserver: option 'x' is wrong"
    ]


def test_missing_repository_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "environment_problem", lambda: None)
    server = TritonServer(tmp_path / "none", http_port=1, grpc_port=2, metrics_port=3)
    with pytest.raises(ServerStartFailed, match="there is no model repository"):
        server.start()


def test_environment_problem_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_server, "MIN_SHARED_MEMORY_BYTES", 1 << 60)
    server = TritonServer(tmp_path, http_port=1, grpc_port=2, metrics_port=3)
    with pytest.raises(ServerStartFailed, match=r"/dev/shm has \d+ MB free.*--shm-size"):
        server.start()


def test_missing_libpython_and_old_glibc_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "find_libpython", lambda: None)
    problem = triton_server.environment_problem()
    assert problem is not None
    assert "sudo apt-get install libpython3." in problem
    monkeypatch.undo()
    monkeypatch.setattr(triton_server.platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert "this machine has 2.31" in str(triton_server.environment_problem())


# Aborts so many times, then answers like a server that is ready.
ABORTING = """
import http.server, os, pathlib, sys
count = pathlib.Path(sys.argv[1])
starts = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(starts))
if starts <= int(sys.argv[2]):
    os.abort()
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Ready).serve_forever()
"""


class AbortingServer(TritonServer):
    aborts = 0

    def _environment_problem(self) -> str | None:
        return None

    def _prepare(self, cleanup: contextlib.ExitStack) -> tuple[list[str], dict[str, str]]:
        count = self.model_repository / "starts"
        arguments = [str(count), str(self.aborts), str(self.http_port)]
        return [sys.executable, "-c", ABORTING, *arguments], dict(os.environ)


@pytest.fixture
def aborting(tmp_path: Path) -> Iterator[AbortingServer]:
    ports = {name: find_free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    server = AbortingServer(tmp_path, log_path=tmp_path / "log", **ports)
    yield server
    server.kill()


def test_a_server_that_aborts_while_it_starts_is_started_again(aborting: AbortingServer) -> None:
    aborting.aborts = 2
    aborting.start()
    aborting.wait_ready(timeout_s=60)
    assert (aborting.model_repository / "starts").read_text() == "3"


def test_a_server_that_always_aborts_is_reported(aborting: AbortingServer) -> None:
    aborting.aborts = 99
    aborting.start()
    with pytest.raises(ServerCrashed, match="ended with exit code -6"):
        aborting.wait_ready(timeout_s=60)
    assert (aborting.model_repository / "starts").read_text() == "3"


def test_wait_and_stop_without_a_process_do_nothing(tmp_path: Path) -> None:
    server = TritonServer(tmp_path, http_port=1, grpc_port=2, metrics_port=3)
    assert server.stop() is None
    assert server.wait(timeout_s=0) is None
    assert not server.is_running()
