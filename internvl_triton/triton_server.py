"""Runs the real `tritonserver` that ships in the wheel `nvidia-pytriton`, as a child process.

    with TritonServer(repository, http_port=8000, grpc_port=8001, metrics_port=8002) as server:
        server.wait_ready(timeout_s=60)
        ...                                   # talk to server.grpc_url
    print(server.exit_code)

What the server needs is put into one temporary folder and removed afterwards; nothing is written
into site-packages. Its Python models run in the interpreter that runs this module.
"""

import contextlib
import errno
import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import PortInUse, ServerCrashed, ServerStartFailed
from internvl_triton.libpython import LIBPYTHON, find_libpython
from internvl_triton.supervisor import KILL_NOW, SHARED_MEMORY, remove_shared_memory, supervised

LOOPBACK = "127.0.0.1"
# Every model instance takes 1 MB at once and grows by the tensors it passes on.
MIN_SHARED_MEMORY_BYTES = 128 * 2**20
MIN_GLIBC = (2, 35)
# tritonserver does not always leave when its exit timeout is over: an idle stream can hold it.
KILL_GRACE_S = 5.0
START_ATTEMPTS = 3
CLEAN_UP_TIMEOUT_S = 10.0  # the supervisor kills and reaps, which takes milliseconds
CONTROL_HEADER = "launcher-token"
STUB = "triton_python_backend_stub"
UNTELLING = re.compile(r"I\d{4} |\+--|\| |[EW]\d{4} .*(cuda|pinned_memory)", re.IGNORECASE)


class TritonServer:
    """One tritonserver process that serves `model_repository`.

    The server is killed when the thread that called `start` ends, so start it from a thread that
    outlives it. It runs under a supervisor of its own (`supervisor.py`), in its own session:
    Ctrl-C in a terminal reaches the launcher only, and nothing of a server that ends is left.

    Args:
        log_path: where the server's log goes. None: to the launcher's own stdout and stderr.
        exit_timeout_s: how long `stop` lets running requests finish.
        arguments: further command-line arguments of tritonserver.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        http_port: int,
        grpc_port: int,
        metrics_port: int,
        host: str = LOOPBACK,
        log_path: Path | None = None,
        exit_timeout_s: int = 30,
        arguments: Sequence[str] = (),
    ) -> None:
        self.model_repository = model_repository.resolve()
        self.host = host
        self.http_port = http_port
        self.grpc_port = grpc_port
        self.metrics_port = metrics_port
        self.log_path = log_path
        self.exit_timeout_s = exit_timeout_s
        self.arguments = list(arguments)
        self.exit_code: int | None = None
        """The server's exit code once it has ended; negative: the signal that killed it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._shared_memory_prefix = f"internvl_{os.getpid()}_{secrets.token_hex(4)}_"
        self._control_token = secrets.token_hex(16)
        self._cleanup = contextlib.ExitStack()

    @property
    def http_url(self) -> str:
        """`host:port` of the HTTP endpoint, for a client on this machine."""
        return f"{self._client_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of the gRPC endpoint, for a client on this machine."""
        return f"{self._client_host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics, for a client on this machine."""
        return f"http://{self._client_host}:{self.metrics_port}/metrics"

    @property
    def _client_host(self) -> str:
        return LOOPBACK if self.host == "0.0.0.0" else self.host

    @property
    def pid(self) -> int | None:
        """Process id of the running server's supervisor, whose child the server is."""
        return self._process.pid if self._process else None

    def __enter__(self) -> "TritonServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and return at once; `wait_ready` waits for the models.

        Raises:
            ServerStartFailed: this environment cannot run tritonserver, or there is no repository.
            PortInUse: one of the three ports is taken.
        """
        if self._process is not None:
            raise RuntimeError("this server is running; stop it before starting it again")
        if problem := self._environment_problem():
            raise ServerStartFailed(problem)
        if not self.model_repository.is_dir():
            raise ServerStartFailed(
                f"there is no model repository {self.model_repository}; build it with"
                " `make engines`, or name a directory that holds one folder per model"
            )
        check_ports(
            {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port},
            host=self.host,
        )
        self.exit_code = None
        with contextlib.ExitStack() as cleanup:
            self._process = self._launch(cleanup)
            self._cleanup = cleanup.pop_all()

    def _environment_problem(self) -> str | None:
        return environment_problem()

    def _prepare(self, cleanup: contextlib.ExitStack) -> tuple[list[str], dict[str, str]]:
        """The command that starts the server, and its environment."""
        folder = Path(tempfile.mkdtemp(prefix="tritonserver-"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        wheel = _pytriton_folder()
        _lay_out_backend(wheel, folder / "python")
        return self._command(wheel, folder), _environment(wheel, folder / "python")

    def _launch(self, cleanup: contextlib.ExitStack) -> "subprocess.Popen[bytes]":
        # The supervisor removes it too, unless it was killed itself.
        cleanup.callback(remove_shared_memory, self._shared_memory_prefix)
        command, environment = self._prepare(cleanup)
        log: BinaryIO | None = None
        if self.log_path:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it may say why that server ended
                self.log_path.replace(self.log_path.with_suffix(".previous.log"))
            log = cleanup.enter_context(self.log_path.open("wb"))
        return subprocess.Popen(
            supervised(command, shared_memory_prefix=self._shared_memory_prefix),
            cwd="/",  # the stub puts its working directory first on sys.path
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,
        )

    def _command(self, wheel: Path, backends: Path) -> list[str]:
        options = {
            "model-repository": self.model_repository,
            "backend-directory": backends,
            "backend-config": f"python,shm-region-prefix-name={self._shared_memory_prefix}",
            "pinned-memory-pool-byte-size": 0,  # for GPUs
            "allow-gpu-metrics": "false",
            "exit-timeout-secs": self.exit_timeout_s,
            "http-address": self.host,
            "http-port": self.http_port,
            "grpc-address": self.host,
            "grpc-port": self.grpc_port,
            "metrics-address": self.host,
            "metrics-port": self.metrics_port,
        }
        program = wheel / "tritonserver" / "bin" / "tritonserver"
        command = [str(program), "--disable-auto-complete-config"]  # it costs a stub per model
        return [
            *command,
            *(f"--{name}={value}" for name, value in options.items()),
            *control_options(self._control_token),
            *self.arguments,
        ]

    def is_running(self) -> bool:
        """Whether the process is alive. It may not be ready yet."""
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        """Whether the server says that all its models can be used."""
        status, _ = self.request("GET", "/v2/health/ready", timeout_s=2)
        return status == 200

    def wait_ready(self, timeout_s: float) -> None:
        """Return when all models are loaded. A server that aborts meanwhile is started again.

        Raises:
            ServerStartFailed: the process ended or the time is over; with the reasons in its log.
            ServerCrashed: a signal ended it.
        """
        deadline = time.monotonic() + timeout_s
        attempts = 1
        while not self.is_ready():
            if not self.is_running():
                exit_code = self._process.returncode if self._process else None
                # WAR: on a busy machine a lock that tritonserver shares with a starting stub can
                # time out (boost::interprocess::lock_exception after 10 s), and it aborts.
                if exit_code == -signal.SIGABRT and attempts < START_ATTEMPTS:
                    attempts += 1
                    self.kill()
                    self.start()
                    continue
                ended = f"tritonserver ended with exit code {exit_code} before it was ready"
                crashed = exit_code is not None and exit_code < 0
                kind = ServerCrashed if crashed else ServerStartFailed
                raise kind(f"{ended}\n{self._log_excerpt()}")
            if time.monotonic() > deadline:
                late = f"tritonserver was not ready after {timeout_s:g} s"
                raise ServerStartFailed(f"{late}\n{self._log_excerpt()}")
            time.sleep(0.1)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the process to end by itself. Its exit code, or None when the time is over."""
        if self._process is None:
            return self.exit_code
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the running ones end. Whether all have ended in time.

        Triton does both when it unloads the ensemble: its readiness turns false at once, and its
        steps stay loaded for the requests that are under way. (SIGTERM alone would silence them.)
        """
        deadline = time.monotonic() + timeout_s
        self._control(f"models/{contract.ENSEMBLE.name}/unload")
        while self.is_running():
            if self._ensemble_state() == "UNAVAILABLE":
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _ensemble_state(self) -> str | None:
        """READY, LOADING, UNLOADING, UNAVAILABLE; None when the server does not answer."""
        status, body = self._control("index")
        if status != 200:
            return None
        states: dict[str, str] = {
            model["name"]: model.get("state", "") for model in json.loads(body)
        }
        return states.get(contract.ENSEMBLE.name, "UNAVAILABLE")

    def _control(self, path: str) -> tuple[int | None, bytes]:
        """Ask Triton's model-repository API."""
        headers = {CONTROL_HEADER: self._control_token}
        return self.request("POST", f"/v2/repository/{path}", b"{}", headers)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        *,
        port: int | None = None,
        timeout_s: float = 5.0,
    ) -> tuple[int | None, bytes]:
        """HTTP status and body; None and why, when no answer came. port: None is the HTTP one."""
        connection = http.client.HTTPConnection(
            self._client_host, port or self.http_port, timeout=timeout_s
        )
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body, headers or {})
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException) as error:
                return None, str(error or type(error).__name__).encode()

    def model_processes(self) -> dict[int, str]:
        """Process id -> model of every live Python model of this server."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if len(arguments) > 2 and Path(arguments[0]).name == STUB:
                _, model_file, region, *_ = arguments
                if Path(region).name.startswith(self._shared_memory_prefix):
                    found[int(path.parent.name)] = Path(model_file).parent.parent.name
        return found

    def stop(self) -> int | None:
        """End the server and remove what it left. Its exit code. Call `drain` first: see there.

        Whatever is alive `exit_timeout_s` + 5 s later is killed. Does nothing when not running.
        """
        if self._process is None:
            return self.exit_code
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self.wait(self.exit_timeout_s + KILL_GRACE_S)
        finally:  # a second Ctrl-C while waiting must not leave anything behind either
            self.kill()
        return self.exit_code

    def kill(self) -> int | None:
        """End the server at once and remove what it left. Its exit code."""
        if self._process is not None:
            self.exit_code = _kill(self._process)
            self._cleanup.close()
            self._process = None
        return self.exit_code

    def _log_excerpt(self) -> str:
        if self.log_path is None:
            return "its log is above"
        reasons = log_reasons(self.log_path.read_text(errors="replace"))
        return "\n".join([f"the end of its log, {self.log_path}:", *reasons])


def control_options(token: str) -> list[str]:
    """Options that let only those who know the token load and unload models."""
    restricted = f"model-repository:{CONTROL_HEADER}={token}"
    return [
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
    ]


def log_reasons(log: str, *, limit: int = 30) -> list[str]:
    """The lines of a tritonserver log that tell why it did not start, at most the last `limit`.

    They are not simply the last ones: a table of all options is printed between error and end.
    """
    without_usage = log.partition("\nUsage: ")[0]  # pages of it follow a wrong option
    lines = [line.rstrip() for line in without_usage.splitlines()]
    told = [line for line in lines if line and not UNTELLING.match(line)]
    return (told or lines)[-limit:]


def environment_problem() -> str | None:
    """What keeps tritonserver from running in this Python environment, as one sentence, or None."""
    return next(_environment_problems(), None)


def _environment_problems() -> Iterator[str]:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if importlib.util.find_spec("pytriton") is None:
        yield "tritonserver is not installed here; run `make env`, or install the extra [cpu]"
        return
    stubs = _pytriton_folder() / "tritonserver" / "python_backend_stubs"
    if not (stubs / version).is_dir():
        yield f"tritonserver has no stub for Python {version}; use Python 3.10, 3.11 or 3.12"
    if find_libpython() is None:
        yield (
            f"the library {LIBPYTHON} is missing, which the models run in; run `make env`, or"
            f" install it: sudo apt-get install libpython{version}"
        )
    name, glibc = platform.libc_ver()
    if name == "glibc" and tuple(int(part) for part in glibc.split(".")[:2]) < MIN_GLIBC:
        yield f"tritonserver needs glibc 2.35 (Ubuntu 22.04, Debian 12); this machine has {glibc}"
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        yield (
            f"the models' environment holds numpy {numpy_version}, which the stubs of this"
            ' tritonserver cannot use; run: pip install "numpy<2"'
        )
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free_bytes < MIN_SHARED_MEMORY_BYTES:
        yield (
            f"{SHARED_MEMORY} has {free_bytes >> 20} MB free, and the models exchange tensors"
            f" there: {MIN_SHARED_MEMORY_BYTES >> 20} MB are needed; give a container more with"
            " --shm-size=1g"
        )


def find_free_port(host: str = LOOPBACK) -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_ports(ports: dict[str, int], *, host: str = LOOPBACK) -> None:
    """Check that the server can listen on all `ports`, given as {what it is for: port}.

    Raises:
        PortInUse: a port is taken, by another program or by another entry.
        ServerStartFailed: a port or the host cannot be listened on at all.
    """
    taken: dict[int, str] = {}
    for purpose, port in ports.items():
        remedy = f"choose another one with {_port_options(purpose)}"
        if port in taken:
            raise PortInUse(f"port {port} is given for both {taken[port]} and {purpose}; {remedy}")
        taken[port] = purpose
        if not 0 < port < 65536:
            raise ServerStartFailed(
                f"the {purpose} port is {port}, but ports go from 1 to 65535; {remedy}"
            )
        with socket.socket() as probe:
            # As the server does it: a port whose last connection has just closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortInUse(
                        f"{purpose} port {port} on {host} is in use by another program;"
                        f" stop that program, or {remedy}"
                    ) from error
                raise ServerStartFailed(
                    f"cannot listen on {purpose} port {port} of {host}: {error.strerror}; {remedy}"
                ) from error


def _port_options(purpose: str) -> str:
    name = purpose.lower()
    return f"--{name}-port (make: {name.upper()}_PORT=<port>)"


def _pytriton_folder() -> Path:
    """The installed package `pytriton`, found without importing it."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None, "environment_problem() checks this"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _lay_out_backend(wheel: Path, folder: Path) -> None:
    """Make `folder` the Python backend: its library, the stub of this Python, and libpython."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    backend = wheel / "tritonserver" / "backends" / "python"
    stubs = wheel / "tritonserver" / "python_backend_stubs"
    libpython = find_libpython()
    assert libpython is not None, "environment_problem() checks this"
    folder.mkdir()
    for file in (
        backend / "libtriton_python.so",
        backend / "triton_python_backend_utils.py",
        stubs / version / "triton_python_backend_stub",
        libpython,
    ):
        (folder / file.name).symlink_to(file)


def _environment(wheel: Path, backend: Path) -> dict[str, str]:
    """The server's environment: the stub runs the first `python3` on PATH and loads libpython."""
    libraries = [str(wheel.parent / "nvidia_pytriton.libs"), str(backend)]
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    path = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }


def _kill(supervisor: "subprocess.Popen[bytes]") -> int:
    """End a server at once, with all that belongs to it. Its exit code."""
    if supervisor.poll() is None:
        supervisor.send_signal(KILL_NOW)
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(CLEAN_UP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # all gone, unless the supervisor was killed
        os.killpg(supervisor.pid, signal.SIGKILL)
    return supervisor.wait()
