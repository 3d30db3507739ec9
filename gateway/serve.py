"""Serve a running InternVL service as an OpenAI-compatible endpoint until Ctrl-C.

    python -m gateway.serve --grpc-port 8001 --port 9000

With --api-keys FILE, or a key in the environment variable GATEWAY_API_KEY, every request below /v1
has to send one: `Authorization: Bearer KEY`. The chat page at / has a field for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from internvl_triton.client import DEFAULT_TIMEOUT_S, AsyncClient
from internvl_triton.errors import PortInUse, ServerUnavailable
from internvl_triton.program import program

DEFAULT_PORT = 9000
DRAIN_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0  # for the service to hear of generations that nobody waits for any more
KEY_VARIABLE = "GATEWAY_API_KEY"
DEMO_SAMPLES = Path(__file__).parents[1] / "demo" / "samples"


async def serve(
    listening: socket.socket,
    grpc_url: str,
    *,
    api_keys: Collection[str],
    samples: Path | None,
    max_body_bytes: int,
    timeout_s: float,
    drain_timeout_s: float,
) -> None:
    """Answer on `listening` until SIGINT or SIGTERM; requests that run then have
    drain_timeout_s to finish."""
    import uvicorn

    from gateway.app import create_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's own, but a signal that was obeyed is not raised again at the end."""
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield

    async with AsyncClient(grpc_url, timeout_s=timeout_s) as engine:
        app = create_app(engine, api_keys=api_keys, samples=samples, max_body_bytes=max_body_bytes)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=drain_timeout_s,
        )
        server = Server(config)
        await _announce(listening, engine, grpc_url)
        await server.serve(sockets=[listening])
        if tasks := set(server.server_state.tasks):
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)


async def _announce(listening: socket.socket, engine: AsyncClient, grpc_url: str) -> None:
    host, port = listening.getsockname()[:2]
    try:
        served = (await engine.limits()).model
    except ServerUnavailable:
        served = f"what will be served at {grpc_url}, where nobody answers yet"
    print(f"serving {served}")
    print(f"  chat     http://{host}:{port}/")
    print(f"  OpenAI   http://{host}:{port}/v1")
    print(f"  ready?   http://{host}:{port}/health/ready")
    print(f"  metrics  http://{host}:{port}/metrics")
    print("Ctrl-C stops it.", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Raises PortInUse, also for an address that is not this machine's."""
    try:
        listening = socket.create_server((host, port), backlog=2048)
        # Event loops set it only where they have made the socket themselves; without it the kernel
        # holds a small chunk back until the client has acknowledged the one before, up to 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise PortInUse(
            f"{host}:{port} cannot be listened on ({error.strerror}); stop the other program or "
            "choose GATEWAY_PORT= (--port)"
        ) from error


@program(interrupted="stopped before it was ready")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gateway.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="(%(default)s)")
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="one key a line")
    parser.add_argument(
        "--samples",
        type=Path,
        default=DEMO_SAMPLES if DEMO_SAMPLES.is_dir() else None,
        metavar="DIR",
        help="with samples.json: what the page offers for the demo model (demo/samples)",
    )
    parser.add_argument(
        "--max-body-bytes", type=int, default=64 * 2**20, help="of a request (%(default)s)"
    )
    service = parser.add_argument_group("the service behind it")
    service.add_argument("--grpc-host", default="127.0.0.1", help="(%(default)s)")
    service.add_argument("--grpc-port", type=int, default=8001, help="(%(default)s)")
    service.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="of one request, until its last chunk (%(default)s)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=DRAIN_TIMEOUT_S,
        metavar="SECONDS",
        help="how long running requests may go on after Ctrl-C or SIGTERM (%(default)s)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keys = _keys(args.api_keys, os.environ.get(KEY_VARIABLE))
    import uvloop

    with listen(args.host, args.port) as listening:
        uvloop.run(
            serve(
                listening,
                f"{args.grpc_host}:{args.grpc_port}",
                api_keys=keys,
                samples=args.samples,
                max_body_bytes=args.max_body_bytes,
                timeout_s=args.timeout,
                drain_timeout_s=args.drain_timeout,
            )
        )
    print("stopped")
    return 0


def _keys(file: Path | None, variable: str | None) -> frozenset[str]:
    keys = frozenset((variable,) if variable else ())
    if file is not None:
        from gateway.api_keys import read_api_keys

        keys |= read_api_keys(file)
    return keys


if __name__ == "__main__":
    raise SystemExit(main())
