"""What the load generator itself costs, measured against a server that answers at once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.load import Load, run_load_at
from benchmarks.metrics import defined, distribution, output_throughput, tpot_s, ttft_s
from benchmarks.paced_server import paced_server
from benchmarks.records import RequestRecord
from benchmarks.workload import Workload

__all__ = ["Overhead", "measure_overhead"]


@dataclass(frozen=True)
class Overhead:
    """Generator and null server together: an upper limit of the generator's own share.

    ttft_ms, token_ms: median time added to a first token and to each further one, one user.
    cpu_ms_per_request: the generator's own processor time. max_tokens_per_s: at `concurrency`.
    """

    ttft_ms: float
    token_ms: float
    cpu_ms_per_request: float
    concurrency: int
    max_tokens_per_s: float


def measure_overhead(
    protocol: str, workload: Workload, *, concurrency: int, conversations: int = 32
) -> Overhead:
    """protocol: "grpc" or "http". The same workload as the run's, so the same bytes are sent."""
    with paced_server() as addresses:
        address = addresses[0] if protocol == "grpc" else addresses[1]

        def run(users: int) -> list[RequestRecord]:
            load = Load(concurrency=users, conversations=conversations, warm_up=4)
            records = run_load_at(address, workload, load, timeout_s=120)
            return [record for record in records if not record.warm_up]

        one = run(1)
        began = time.process_time()
        many = run(concurrency)
        cpu_s = time.process_time() - began
    return Overhead(
        ttft_ms=1000 * distribution(defined(ttft_s, one)).p50,
        token_ms=1000 * distribution(defined(tpot_s, one) or [0.0]).p50,
        cpu_ms_per_request=1000 * cpu_s / len(many),
        concurrency=concurrency,
        max_tokens_per_s=output_throughput(many),
    )
