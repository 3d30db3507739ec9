"""`make serve` as a process of its own, for tests of how it stops and what it survives."""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from internvl_triton.triton_server import find_free_port

__all__ = ["Served", "serve"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    repository: Path
    http_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def read_until(self, text: str) -> str:
        """What it prints up to the line that holds `text`. Fails when it ends before."""
        assert self.process.stdout is not None
        printed = ""
        for line in self.process.stdout:
            printed += line
            if text in line:
                return printed
        raise AssertionError(f"it ended without {text!r}, after printing:\n{printed}")

    def read_rest(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def status(self, path: str, body: bytes | None = None) -> int | None:
        """HTTP status of a path; None when nobody answers. With a body it is a POST."""
        try:
            return self._ask(path, body).status
        except (OSError, http.client.HTTPException):
            return None

    def get(self, path: str) -> bytes:
        return self._ask(path, None).read()

    def _ask(self, path: str, body: bytes | None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        connection.request("GET" if body is None else "POST", path, body, {"Connection": "close"})
        return connection.getresponse()

    def is_ready(self) -> bool:
        """As Kubernetes asks."""
        return self.status("/v2/models/internvl/ready") == 200


@contextmanager
def serve(checkpoint: Path, artifacts_dir: Path, *options: str) -> Iterator[Served]:
    """The service of a built checkpoint, ready; `options` are those of build.serve."""
    ports = {name: find_free_port() for name in ("http", "grpc", "metrics")}
    command = [
        *(sys.executable, "-m", "build.serve", f"--model={checkpoint}"),
        *(f"--artifacts={artifacts_dir}", "--profile=cpu"),
        *(f"--{name}-port={port}" for name, port in ports.items()),
        *options,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    repository = artifacts_dir / checkpoint.name / "repository"
    served = Served(process, repository, ports["http"], ports["grpc"])
    with process:
        try:
            served.read_until("Ctrl-C")
            yield served
        finally:
            process.kill()
