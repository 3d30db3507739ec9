"""The service that a benchmark asks: one that runs already, or one for the benchmark's time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internvl_triton.triton_server import find_free_port

__all__ = ["Service", "running_service"]

READY_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Service:
    """Where a service listens: host:port of gRPC, and the address of its metrics if known."""

    grpc_url: str
    metrics_url: str | None = None
    process_id: int | None = None  # of a server that was started for the benchmark


@contextlib.contextmanager
def running_service(
    model: str,
    *,
    server: str | None = None,
    metrics_url: str | None = None,
    tp_size: int = 1,
    precision: str | None = None,
    artifacts_dir: Path = Path("artifacts"),
) -> Iterator[Service]:
    """The service at `server`; without one, build `model` for the CPU, serve it, and stop it after.

    Raises InternVLTritonError: not to be built, not ready.
    """
    if server is not None:
        yield Service(server, metrics_url)
        return
    from build import build_engines, make_server

    build_engines(
        model,
        tp_size=tp_size,
        profile="cpu",
        precision=precision,
        artifacts_dir=artifacts_dir,
        progress=False,
    )
    with make_server(
        model,
        tp_size=tp_size,
        profile="cpu",
        precision=precision,
        artifacts_dir=artifacts_dir,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
    ) as running:
        running.wait_ready(READY_TIMEOUT_S)
        yield Service(running.grpc_url, running.metrics_url, running.pid)
