"""What the pipeline itself costs: the real ensemble around engines that answer at once.

    python -m benchmarks.pipeline_cost --model demo

Preprocessing, postprocessing, Triton, gRPC and the client are the real ones; the vision step gives
zeros and the language model a fixed token, without computing. Rows: a request, and how many chunks
postprocessing takes at a time (`make serve POSTPROCESSING_BATCH=`), one service for each, measured
in turn, several rounds, of which the medians are shown. Columns: added per request, the latency of
an answer of one token for one user; per token, TPOT of one user; requests/s with answers of one
token, and streamed tokens/s, both at `--concurrency` users. The answers whose tokens are counted
are long, so that the requests' own cost, which requests/s tells, does not count twice.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load_at
from benchmarks.markdown import markdown_table
from benchmarks.metrics import (
    defined,
    distribution,
    errors_by_kind,
    latency_s,
    output_throughput,
    request_throughput,
    tpot_s,
)
from benchmarks.option_types import at_least
from benchmarks.records import RequestRecord
from benchmarks.workload import Case, GeneratedWorkload, Workload
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import LLMBuild
from internvl_triton.errors import RequestFailed
from internvl_triton.program import program
from internvl_triton.triton_config import render_repository
from internvl_triton.triton_server import TritonServer, find_free_port

__all__ = ["answered", "null_service", "pipeline_rows"]

NULL_ENGINES = Path(__file__).parent / "null_engines"
CASES = ("text", "448x448", "1280x720", "1920x1080")
READY_TIMEOUT_S = 300.0


@contextlib.contextmanager
def null_service(
    model: str, artifacts_dir: Path, *, postprocessing_batch: int = 1
) -> Iterator[str]:
    """gRPC host:port of the service for `model` with null engines. Raises InternVLTritonError."""
    from build import build_engines, default_precision, deployment_of

    artifacts = build_engines(model, profile="cpu", artifacts_dir=artifacts_dir, progress=False)
    # Beside the real repository: the configs name the artefacts relative to it.
    with tempfile.TemporaryDirectory(dir=artifacts.root, prefix="null-") as folder:
        repository = Path(folder)
        shutil.copytree(artifacts.repository, repository, dirs_exist_ok=True)
        for step in (contract.VISION_ENCODER.name, contract.TENSORRT_LLM.name):
            shutil.copyfile(NULL_ENGINES / f"{step}.py", repository / step / "1" / "model.py")
        deployment = deployment_of(
            artifacts,
            LLMBuild(default_precision(artifacts.spec()), 1),
            postprocessing_batch=postprocessing_batch,
        )
        last = contract.POSTPROCESSING.name
        config = render_repository(deployment)[last]
        (repository / last / "config.pbtxt").write_text(config, encoding="utf-8")
        server = TritonServer(
            repository,
            http_port=find_free_port(),
            grpc_port=find_free_port(),
            metrics_port=find_free_port(),
            log_path=artifacts.root / f"null-engines-{postprocessing_batch}.log",
            exit_timeout_s=10,
        )
        with server:
            server.wait_ready(READY_TIMEOUT_S)
            yield server.grpc_url


def answered(address: str, workload: Workload, load: Load, case: str) -> list[RequestRecord]:
    """What was measured. Raises RequestFailed, naming the case, when a request fails."""
    records = [r for r in run_load_at(address, workload, load, timeout_s=120) if not r.warm_up]
    if errors := errors_by_kind(records):
        failed = next(record for record in records if record.error)
        raise RequestFailed(f"{case} at {address}: {errors}, such as: {failed.message}")
    return records


def pipeline_rows(
    services: Mapping[int, str],
    cases: Sequence[str],
    *,
    requests: int,
    tokens: int,
    concurrency: int,
    rounds: int,
) -> list[list[str]]:
    """Header, then a row per case and service (chunks at a time -> gRPC host:port).

    Raises RequestFailed when a request fails.
    """

    def measured(
        grpc_url: str, case: str, users: int, output_tokens: int, seed: tuple[int, int]
    ) -> list[RequestRecord]:
        length = Lengths(str(output_tokens))
        workload = GeneratedWorkload((Case.parse(case),), seed=seed, output_tokens=length)
        load = Load(concurrency=users, conversations=requests, warm_up=users + 2)
        return answered(f"grpc://{grpc_url}", workload, load, case)

    def one_round(url: str, case: str, number: int) -> tuple[float, float, float, float]:
        one = distribution(defined(latency_s, measured(url, case, 1, 1, (number, 1)))).p50
        token = distribution(defined(tpot_s, measured(url, case, 1, tokens, (number, 2)))).p50
        busy = request_throughput(measured(url, case, concurrency, 1, (number, 3)))
        streamed = output_throughput(measured(url, case, concurrency, tokens, (number, 4)))
        return 1000 * one, 1000 * token, busy, streamed

    head = ["request", "chunks at a time"]
    rows = [[*head, "ms added", "ms per token", "requests/s", "tokens/s"]]
    for case in cases:
        found: dict[int, list[tuple[float, ...]]] = {batch: [] for batch in services}
        for number in range(rounds):
            for batch, url in services.items():
                found[batch].append(one_round(url, case, number))
        for batch, values in found.items():
            one, token, busy, streamed = np.median(values, axis=0)
            cells = [f"{one:.1f}", f"{token:.3f}", f"{busy:.1f}", f"{streamed:.0f}"]
            rows.append([case, str(batch), *cells])
    return rows


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="whose prompts and shapes (%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"({' '.join(CASES)})")
    parser.add_argument(
        "--requests", type=at_least(1), default=96, help="per measurement (%(default)s)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="(%(default)s)")
    parser.add_argument(
        "--tokens", type=at_least(2), default=128, help="of a long answer (%(default)s)"
    )
    parser.add_argument("--concurrency", type=at_least(1), default=32, help="(%(default)s)")
    parser.add_argument(
        "--postprocessing-batch",
        type=at_least(1),
        nargs="+",
        default=(1, 64),
        metavar="N",
        help="chunks at a time (1 64)",
    )
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as running:
        services = {
            batch: running.enter_context(
                null_service(args.model, args.artifacts, postprocessing_batch=batch)
            )
            for batch in args.postprocessing_batch
        }
        rows = pipeline_rows(
            services,
            args.cases,
            requests=args.requests,
            tokens=args.tokens,
            concurrency=args.concurrency,
            rounds=args.rounds,
        )
    cores = len(os.sched_getaffinity(0))
    shown = f"{args.concurrency} users, {args.tokens} tokens, {args.rounds} rounds, {cores} cores"
    print(f"\nThe pipeline around null engines, {shown}\n")
    print(markdown_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
