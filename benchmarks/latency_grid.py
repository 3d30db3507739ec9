"""Latency of the service by requests at a time, tiles of a request and TP.

    python -m benchmarks.latency_grid --model InternVL2_5-8B --server 127.0.0.1:8001

One run measures the build that is served: every number of --tiles with every --batch. It writes a
file to --output and then a report of all files there, so serve one TP after the other and measure
each into the same folder. Without --server, MODEL is built and served on the CPU.

The requests of a point are alike, one picture and one question, answers have exactly
--output-tokens tokens, and all pictures differ, so no cache helps; a second run against the same
server needs another --seed for that. Beside what is measured stand the planner's floors
(`make plan`) for the GPUs that nvidia-smi lists here, or for --gpu.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.environment import describe_environment
from benchmarks.gpu_use import GpuUse
from benchmarks.grid_report import GridPoint, GridRun, write_report
from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load_at
from benchmarks.metrics import SLO, errors_by_kind
from benchmarks.records import RequestRecord
from benchmarks.running_service import running_service
from benchmarks.served_build import ServedBuild, read_served_build
from benchmarks.summary import summarise
from benchmarks.workload import Case, GeneratedWorkload
from internvl_triton.artifacts import Artifacts
from internvl_triton.errors import InvalidRequest
from internvl_triton.model_spec import ModelSpec
from internvl_triton.program import program

if TYPE_CHECKING:
    from build import Floors

__all__ = ["case_of", "floors_of_point", "main", "measure"]

REPORTS = Path("benchmarks") / "grid"  # below the artefacts


def case_of(num_tiles: int, *, most: int) -> Case:
    """A request with so many tiles; 0 is text. Raises InvalidRequest for what no picture has."""
    if num_tiles > most:
        raise InvalidRequest(f"--tiles has {num_tiles}; a picture of this model has up to {most}")
    return Case.parse(f"tiles={num_tiles}" if num_tiles else "text")


def floors_of_point(
    floors: Floors, *, num_tiles: int, batch: int, input_tokens: int, output_tokens: int
) -> dict[str, float]:
    """vision_ms, prefill_ms and step_ms; and of them ttft_ms, tpot_ms, latency_ms and
    output_tokens_per_s, which is a ceiling."""
    vision = 1000 * floors.vision_s(num_tiles, num_gpus=floors.tp_size)
    prefill = 1000 * floors.prefill_s(input_tokens)
    step = 1000 * floors.step_s(batch, input_tokens + output_tokens / 2)
    return {
        "vision_ms": vision,
        "prefill_ms": prefill,
        "step_ms": step,
        "ttft_ms": vision + prefill,
        "tpot_ms": step,
        "latency_ms": vision + prefill + (output_tokens - 1) * step,
        "output_tokens_per_s": floors.output_tokens_per_s(
            batch_size=batch,
            num_tiles=num_tiles,
            prompt_tokens=input_tokens,
            output_tokens=output_tokens,
        ),
    }


def measure(grpc_url: str, args: argparse.Namespace) -> GridRun:
    """The whole grid of the service at host:port. Raises InternVLTritonError."""
    from build import artifact_name, floors_of

    environment = describe_environment()
    served = read_served_build(grpc_url)
    if (asked := artifact_name(args.model)) != served.model:
        raise InvalidRequest(
            f"{grpc_url} serves {served.model}, and --model is {asked}: give the one that is served"
        )
    _check_batches(args.batch, served)
    cases = {count: case_of(count, most=served.max_tiles) for count in args.tiles}
    spec = _spec(args.model, args.artifacts / served.model)
    floors, sentence = floors_of(spec, served.llm, profile=served.profile, gpu=args.gpu)
    print(f"{served.model}, {served.llm.name}, {served.profile} profile. {sentence}", flush=True)
    points: list[GridPoint] = []
    for num_tiles, case in cases.items():
        for batch in args.batch:
            seed = (args.seed, len(points) + 1)  # pictures that were not shown before
            workload = GeneratedWorkload(
                (case,),
                seed=seed,
                prompt_words=Lengths(str(args.prompt_words)),
                output_tokens=Lengths(str(args.output_tokens)),
            )
            load = Load(concurrency=batch, conversations=max(args.rounds * batch, 1), warm_up=batch)
            with GpuUse() as gpus:
                records = run_load_at(f"grpc://{grpc_url}", workload, load, timeout_s=args.timeout)
            point = _point(num_tiles, batch, records, args.output_tokens)
            point.gpus = gpus.mean()
            if floors and point.input_tokens:
                point.floors = floors_of_point(
                    floors,
                    num_tiles=num_tiles,
                    batch=batch,
                    input_tokens=point.input_tokens,
                    output_tokens=args.output_tokens,
                )
            points.append(point)
            _tell(point, records)
    return GridRun(
        model=served.model,
        build=served.llm.name,
        profile=served.profile,
        floors=sentence,
        settings={
            "answer": f"{args.output_tokens} tokens",
            "question": f"{args.prompt_words} words",
            "requests": f"{args.rounds} for each place, as many unmeasured before them",
        },
        environment=environment,
        points=points,
    )


def _spec(model: str, artifacts: Path) -> ModelSpec:
    """From what was built, if it was built here, else from the name or directory."""
    from build import spec_of

    built = Artifacts(artifacts)
    return built.spec() if built.tokenizer_dir.is_dir() else spec_of(model)


def _check_batches(batches: Sequence[int], served: ServedBuild) -> None:
    for batch in batches:
        if not 1 <= batch <= served.max_batch_size:
            raise InvalidRequest(
                f"--batch has {batch}; this service was built for 1 to {served.max_batch_size} "
                "requests at a time, further ones would wait"
            )


def _point(
    num_tiles: int, batch: int, records: Sequence[RequestRecord], output_tokens: int
) -> GridPoint:
    measured = [record for record in records if not record.warm_up]
    lengths = [record.input_tokens or 0 for record in measured if not record.error]
    return GridPoint(
        num_tiles=num_tiles,
        batch=batch,
        input_tokens=int(np.median(lengths)) if lengths else 0,
        output_tokens=output_tokens,
        summary=summarise(records, SLO()),
        errors=errors_by_kind(measured),
    )


def _tell(point: GridPoint, records: Sequence[RequestRecord]) -> None:
    """One line as soon as a point is there."""
    shown = {
        "TTFT p50 ms": "ttft_p50_ms",
        "ms per token": "tpot_p50_ms",
        "latency p99 ms": "latency_p99_ms",
        "tokens/s": "output_tokens_per_s",
        "failed": "failed",
    }
    values = ((title, point.summary[name]) for title, name in shown.items())
    cells = ", ".join(f"{title} {value:.4g}" for title, value in values if value is not None)
    print(f"{point.num_tiles:>3} tiles, {point.batch:>3} at a time: {cells}", flush=True)
    for record in records:
        if record.error:
            print(f"     first error: {record.error}: {record.message}", flush=True)
            break


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_grid", description=__doc__.splitlines()[0]
    )
    server = parser.add_argument_group("what is measured")
    server.add_argument("--model", default="demo", help="name or directory (%(default)s)")
    server.add_argument("--server", metavar="HOST:PORT", help="gRPC of a service that runs")
    server.add_argument(
        "--tp-size", type=int, default=1, help="of what is built here (%(default)s)"
    )
    server.add_argument("--precision", help="of what is built here (the checkpoint's)")
    server.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    server.add_argument("--gpu", help="the planner's name of the GPUs (what nvidia-smi says)")
    grid = parser.add_argument_group("grid")
    grid.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    grid.add_argument("--tiles", type=int, nargs="+", default=[1, 7, 13], metavar="N")
    grid.add_argument("--rounds", type=int, default=10, help="requests per place (%(default)s)")
    grid.add_argument("--prompt-words", type=int, default=16, help="(%(default)s)")
    grid.add_argument("--output-tokens", type=int, default=64, help="(%(default)s)")
    grid.add_argument("--timeout", type=float, default=300.0, help="of a request, s (%(default)s)")
    grid.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    report = parser.add_argument_group("report")
    report.add_argument("--output", type=Path, help=f"folder (artifacts/{REPORTS}/MODEL)")
    report.add_argument("--report-only", action="store_true", help="of what is in --output already")
    args = parser.parse_args(argv)
    if min(args.rounds, args.prompt_words) < 1 or args.output_tokens < 2:
        parser.error("--rounds and --prompt-words are at least 1, --output-tokens at least 2")
    from build import artifact_name

    folder = args.output or args.artifacts / REPORTS / artifact_name(args.model)
    if not args.report_only:
        with running_service(
            args.model,
            server=args.server,
            tp_size=args.tp_size,
            precision=args.precision,
            artifacts_dir=args.artifacts,
        ) as service:
            run = measure(service.grpc_url, args)
        run.write(folder)
    text = write_report(folder)
    print(f"\n{text}\nreport: {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
