"""Serve artifacts/<model>/ with Triton in the foreground until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from build import container
from build.engines import default_precision
from build.gpu_precision import check_cpu_choice
from build.gpu_servable import check_gpu_servable
from build.machine import this_machine
from build.model_source import DEMO, artifact_name
from build.profile import PROFILES, choose_profile
from build.repository import assemble_repository, gpu_deployment
from build.servable import check_servable
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.canary import Canary, TritonView
from internvl_triton.errors import InvalidRequest
from internvl_triton.gpu_triton_server import GpuTritonServer
from internvl_triton.keep_serving import keep_serving
from internvl_triton.program import program
from internvl_triton.triton_server import TritonServer

__all__ = ["DEFAULT_PORTS", "make_server"]

DEFAULT_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
READY_TIMEOUT_S = 1800.0  # a 78B engine is read from disk
EXIT_TIMEOUT_S = 10
DRAIN_TIMEOUT_S = 30.0


def make_server(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    kv_cache: str | None = None,
    postprocessing_batch: int = 1,
    artifacts_dir: Path = Path("artifacts"),
    http_port: int = DEFAULT_PORTS["http"],
    grpc_port: int = DEFAULT_PORTS["grpc"],
    metrics_port: int = DEFAULT_PORTS["metrics"],
    host: str = "127.0.0.1",
) -> TritonServer:
    """A server, not yet started, for what `build_engines` made. Its log goes beside the artefacts.

    profile: "gpu" has to run inside the pinned container; None is gpu where there is a GPU.
    postprocessing_batch: see `Deployment`.

    Raises InvalidRequest (no batch of that size), UnknownModel, InvalidTensorParallel,
    BuildFailed (no such profile here), or ArtifactMismatch: not built, or not fitting this machine.
    """
    if postprocessing_batch < 1:
        raise InvalidRequest(
            f"--postprocessing-batch is {postprocessing_batch}; it takes 1 or more, such as 64"
        )
    profile = choose_profile(profile)
    artifacts = Artifacts(artifacts_dir / artifact_name(model))
    artifacts.manifest()
    spec = artifacts.spec()
    spec.llm.check_tp_size(tp_size)
    llm = LLMBuild(precision or default_precision(spec), tp_size, kv_cache)
    log_path = artifacts.root / "tritonserver.log"
    if profile == "cpu":
        check_cpu_choice(llm.precision, kv_cache)
        check_servable(artifacts, llm)
        return TritonServer(
            assemble_repository(artifacts, llm, postprocessing_batch=postprocessing_batch),
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            host=host,
            log_path=log_path,
            exit_timeout_s=EXIT_TIMEOUT_S,
        )
    check_gpu_servable(artifacts, llm, this_machine())
    pool_bytes = gpu_deployment(artifacts, llm).cuda_memory_pool_bytes(spec, artifacts.limits())
    return GpuTritonServer(
        assemble_repository(
            artifacts, llm, profile="gpu", postprocessing_batch=postprocessing_batch
        ),
        num_ranks=llm.tp_size,
        cuda_memory_pool_bytes=pool_bytes,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        log_path=log_path,
        exit_timeout_s=EXIT_TIMEOUT_S,
    )


def _serve(server: TritonServer, model: str, drain_timeout_s: float) -> int:
    print(f"starting Triton for {model} ...", flush=True)
    starts = 0

    def on_ready() -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            print(f"serving {model}")
            print(f"  gRPC     {server.grpc_url}")
            print(f"  HTTP     http://{server.http_url}/v2/models/internvl/generate")
            print(f"  ready?   http://{server.http_url}/v2/models/internvl/ready")
            print(f"  metrics  {server.metrics_url}")
            print(f"  log      {server.log_path}")
            print("Ctrl-C stops it.", flush=True)
        else:
            print(f"serving {model} again", flush=True)

    def on_failure(problem: str, pause_s: float) -> None:
        print(f"{problem}; starting Triton again in {pause_s:g} s ...", file=sys.stderr, flush=True)

    try:
        keep_serving(
            server,
            lambda: Canary(TritonView(server)).problem,
            ready_timeout_s=READY_TIMEOUT_S,
            on_ready=on_ready,
            on_failure=on_failure,
        )
    except KeyboardInterrupt:
        if not starts:
            raise
        return _stop(server, drain_timeout_s)
    finally:
        server.kill()
    return 0


def _stop(server: TritonServer, drain_timeout_s: float) -> int:
    print(
        f"\nstopping: requests that are running have {drain_timeout_s:g} s"
        " (Ctrl-C again ends them at once) ...",
        flush=True,
    )
    try:
        if server.drain(drain_timeout_s):
            server.stop()
        else:
            print("the time is over: ending what still runs", flush=True)
    except KeyboardInterrupt:
        print("\nending at once", flush=True)
    server.kill()
    print("stopped")
    return 0


@program(interrupted="stopped before it was ready")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.serve", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: gpu if there is one, else cpu"
    )
    parser.add_argument("--precision", help="precision of the language model (the checkpoint's)")
    parser.add_argument("--kv-cache", help="of the engine to serve: fp8 or int8 (16 bits)")
    parser.add_argument(
        "--postprocessing-batch",
        type=int,
        default=1,
        metavar="N",
        help="chunks of answers that the last step takes at a time: more tokens/s, but a caller"
        " that goes away without a stop keeps its place until its answer ends (%(default)s)",
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    for name, port in DEFAULT_PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, default=port, help="(%(default)s)")
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=DRAIN_TIMEOUT_S,
        metavar="SECONDS",
        help="how long running requests may go on after Ctrl-C or SIGTERM (%(default)s)",
    )
    args = parser.parse_args(argv)
    # A service manager's SIGTERM ends the server as Ctrl-C does.
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background shell ignores it
        signal.signal(number, signal.default_int_handler)
    container.enter_container("build.serve", args)
    server = make_server(
        args.model,
        tp_size=args.tp_size,
        profile=args.profile,
        precision=args.precision,
        kv_cache=args.kv_cache,
        postprocessing_batch=args.postprocessing_batch,
        artifacts_dir=args.artifacts,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        host=args.host,
    )
    return _serve(server, args.model, args.drain_timeout)


if __name__ == "__main__":
    raise SystemExit(main())
