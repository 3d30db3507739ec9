"""Which of gRPC's pollers a process uses. It is chosen when gRPC is first imported, so whoever
imports it calls `prefer_light_poller` before."""

import os
import sys

__all__ = ["prefer_light_poller"]

_VARIABLE = "GRPC_EXPERIMENTS"


def prefer_light_poller() -> None:
    """Import gRPC with its older way to wait for a client's sockets.

    A streamed token then takes two thirds of the client's CPU time (`make bench-pipeline`). Does
    nothing where gRPC is imported already or the variable GRPC_EXPERIMENTS is set, and does not
    leave that variable to child processes, whose gRPC may be an older one.
    """
    if "grpc" in sys.modules or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "-event_engine_client"
    try:
        import grpc  # noqa: F401
    finally:
        del os.environ[_VARIABLE]
