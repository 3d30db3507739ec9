"""The OpenAI-compatible endpoint as a process of its own, in front of a service."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internvl_triton.errors import ServerStartFailed
from internvl_triton.triton_server import find_free_port

__all__ = ["Gateway", "running_gateway"]

END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Gateway:
    """url: the base URL for OpenAI clients. process: its stdout is a pipe."""

    url: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def running_gateway(
    grpc_url: str, *, options: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Iterator[Gateway]:
    """One for the service at `grpc_url` (host:port), on a free port, until the end of the context.

    Raises ServerStartFailed; what it said is on stderr.
    """
    host, _, grpc_port = grpc_url.rpartition(":")
    port = find_free_port()
    command = [sys.executable, "-m", "gateway.serve", f"--port={port}", *options]
    command += [f"--grpc-host={host}", f"--grpc-port={grpc_port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            if not any("Ctrl-C" in line for line in process.stdout):
                raise ServerStartFailed(f"the gateway ended with exit code {process.wait()}")
            yield Gateway(f"http://127.0.0.1:{port}/v1", process)
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
