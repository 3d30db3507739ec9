"""Load runs: the same workload at one load after the other, with a report.

    python -m benchmarks.bench --model demo --concurrency 1 2 4 8
    python -m benchmarks.bench --target http://127.0.0.1:8000/v1 --rate 0.5 1 2 --mix 1280x720

Without --target it builds MODEL, serves it on the CPU and stops it. Writes run.json, points.csv,
report.md and report.html. benchmarks/metrics.py defines the metrics, benchmarks/workload.py what
--mix takes. Pictures are all different, unless --distinct says otherwise or files hold them, so
that no cache of the server knows them; a second run against the same server needs another --seed
for that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment
from benchmarks.gpu_use import GpuUse
from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load_at
from benchmarks.load_report import markdown_text, write_report
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.metrics import SLO, NoMetricValue, distribution, errors_by_kind
from benchmarks.overhead import measure_overhead
from benchmarks.prometheus import read_samples
from benchmarks.running_service import running_service
from benchmarks.stages import stage_breakdown
from benchmarks.summary import summarise
from benchmarks.targets import served_model
from benchmarks.workload import Case, FileWorkload, GeneratedWorkload
from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program

__all__ = ["main"]

SETTLE_S = 0.5  # the last requests' counters arrive a moment after their answers
REPORTS = Path("artifacts") / "benchmarks" / "load"

AnyWorkload = GeneratedWorkload | FileWorkload


def _workload(args: argparse.Namespace) -> AnyWorkload:
    """Raises InvalidRequest for what cannot be asked."""
    output = Lengths(args.output_tokens)
    if args.images:
        return FileWorkload.of_directory(args.images, seed=args.seed, output_tokens=output)
    if args.jsonl:
        return FileWorkload.of_jsonl(args.jsonl, seed=args.seed, output_tokens=output)
    return GeneratedWorkload(
        tuple(map(Case.parse, args.mix)),
        seed=args.seed,
        turns=args.turns,
        prompt_words=Lengths(args.prompt_words),
        output_tokens=output,
        distinct=args.distinct,
        max_tiles=args.max_tiles,
    )


def _loads(args: argparse.Namespace) -> list[Load]:
    def load(concurrency: int | None, rate: float | None) -> Load:
        return Load(
            concurrency=concurrency,
            rate=rate,
            arrivals=args.arrivals,
            ramp_s=args.ramp,
            warm_up=args.warm_up,
            conversations=args.requests,
            duration_s=args.duration,
            seed=args.seed,
        )

    if args.rate:
        return [load(None, rate) for rate in args.rate]
    return [load(users, None) for users in args.concurrency]


def _part(workload: AnyWorkload, args: argparse.Namespace, number: int) -> AnyWorkload:
    """The workload with pictures that no other part of the run shows to the server."""
    return replace(workload, seed=(args.seed, number))


def _target_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `open_target`."""
    return {
        "timeout_s": args.timeout,
        "let_stop": args.let_stop,
        "model": args.endpoint_model,
        "api_key": args.api_key,
        "extra": args.extra_body,
    }


def measure(
    target: str, metrics_url: str | None, workload: AnyWorkload, args: argparse.Namespace
) -> tuple[LoadRun, Path]:
    """Every load, one after the other, and the report's page, which is written anew after each.

    Raises InternVLTritonError.
    """
    environment = describe_environment()
    model = served_model(target, **_target_options(args))
    name = f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _folder(args.output or REPORTS / name.replace("/", "_"))
    overhead = None
    if not args.no_overhead:
        users = max([load.concurrency or 0 for load in _loads(args)]) or 8
        protocol = "grpc" if target.startswith("grpc://") else "http"
        overhead = asdict(measure_overhead(protocol, _part(workload, args, 0), concurrency=users))
    run = LoadRun(
        title=f"{model}: {_workload_name(args)}",
        settings={
            "build": _build_name(args),
            "target": "started for this run" if args.target is None else target,
            "model": model,
            "workload": _workload_name(args),
            "answer": f"{args.output_tokens} tokens"
            + (", may stop earlier" if args.let_stop else ", never fewer"),
            "distinct pictures": _distinct(args),
            "max_tiles": str(args.max_tiles or "the server's"),
            "extra body": json.dumps(args.extra_body or {}),
            "ramp": f"{args.ramp:g} s",
            "SLO": _slo_name(_slo(args)),
            "seed": str(args.seed),
        },
        environment=environment,
        points=[],
        overhead=overhead,
    )
    for number, load in enumerate(_loads(args), start=1):
        point = _measure_point(target, metrics_url, _part(workload, args, number), load, args)
        run.points.append(point)
        page = write_report(run, folder)
        _tell(point)
    return run, page


def _measure_point(
    target: str,
    metrics_url: str | None,
    workload: AnyWorkload,
    load: Load,
    args: argparse.Namespace,
) -> LoadPoint:
    before = read_samples(metrics_url) if metrics_url else None
    lags_s: list[float] = []
    with GpuUse() as gpus:
        records = run_load_at(target, workload, load, lags_s=lags_s, **_target_options(args))
    if all(record.warm_up for record in records):
        raise InvalidRequest(
            f"{load.name}: nothing was measured behind the warm-up of {load.warm_up} requests and "
            f"the ramp of {load.ramp_s:g} s; give more --requests or a longer --duration"
        )
    point = LoadPoint(
        load=load.name,
        summary=summarise(records, _slo(args)),
        errors=errors_by_kind([record for record in records if not record.warm_up]),
        records=records,
        gpus=gpus.mean(),
        generator_lag_ms=1000 * distribution(lags_s or [0.0]).p99,
    )
    if metrics_url and before:
        time.sleep(SETTLE_S)
        try:
            breakdown = stage_breakdown(records, read_samples(metrics_url).since(before))
            point.stages = {**breakdown.stages, "unaccounted": breakdown.unaccounted_s}
        except NoMetricValue as error:
            point.no_stages = str(error)
    return point


def _folder(path: Path) -> Path:
    """Made now, so that nothing is measured that cannot be written. Raises InvalidRequest."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InvalidRequest(
            f"--output {path} cannot be written ({error.strerror}); give a folder"
        ) from error


def _tell(point: LoadPoint) -> None:
    """One line as soon as a load is over."""
    summary = point.summary
    shown = {
        "requests/s": summary["requests_per_s"],
        "tokens/s": summary["output_tokens_per_s"],
        "TTFT p50 ms": summary["ttft_p50_ms"],
        "latency p99 ms": summary["latency_p99_ms"],
        "failed": summary["failed"],
    }
    cells = (f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
    print(f"{point.load:>16}: {', '.join(cells)}", flush=True)
    for record in point.records:
        if record.error:
            print(f"{'':18}first error: {record.error}: {record.message}", flush=True)
            break


def _slo(args: argparse.Namespace) -> SLO:
    return SLO(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot, latency_s=args.slo_latency)


def _slo_name(slo: SLO) -> str:
    limits = [f"{n.removesuffix('_s')} <= {v:g} s" for n, v in asdict(slo).items() if v is not None]
    return ", ".join(limits) or "none: goodput counts every answer"


def _distinct(args: argparse.Namespace) -> str:
    if args.images or args.jsonl:
        return "those of the files, again and again"
    return str(args.distinct or "all")


def _build_name(args: argparse.Namespace) -> str:
    if args.target is not None:
        return "the target's"
    precision = args.precision or "the checkpoint's precision"
    return f"{precision}, TP {args.tp_size}, CPU engines"


def _workload_name(args: argparse.Namespace) -> str:
    if args.images or args.jsonl:
        return f"{args.images or args.jsonl}"
    turns = f", {args.turns} turns" if args.turns > 1 else ""
    return f"{' + '.join(args.mix)}, {args.prompt_words} words{turns}"


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    if args.target:
        yield args.target, args.metrics_url
        return
    with running_service(
        args.model, tp_size=args.tp_size, precision=args.precision, artifacts_dir=args.artifacts
    ) as service:
        yield f"grpc://{service.grpc_url}", service.metrics_url


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__.splitlines()[0]
    )
    server = parser.add_argument_group("what is measured")
    server.add_argument("--model", default="demo", help="what to build and serve (%(default)s)")
    server.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    server.add_argument("--precision", help="of the language model (the checkpoint's)")
    server.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    server.add_argument("--target", help="grpc://host:port or http://host:port/v1 that runs")
    server.add_argument("--metrics-url", help="of that target's Triton, for the stages")
    server.add_argument("--endpoint-model", help="name in OpenAI requests (the first one listed)")
    server.add_argument("--api-key-variable", help="environment variable with the endpoint's key")
    server.add_argument("--extra-body", help="JSON object, more fields of OpenAI requests")
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="(1 2 4 8)")
    load.add_argument("--rate", type=float, nargs="+", metavar="R", help="open loop: per second")
    load.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    load.add_argument("--ramp", type=float, default=0.0, help="s to reach the load (%(default)s)")
    load.add_argument("--warm-up", type=int, default=4, help="unmeasured requests (%(default)s)")
    load.add_argument("--requests", type=int, help="conversations per load (40, or until DURATION)")
    load.add_argument("--duration", type=float, help="s per load")
    load.add_argument("--timeout", type=float, default=300.0, help="of a request, s (%(default)s)")
    work = parser.add_argument_group("workload")
    work.add_argument("--mix", nargs="+", default=["448x448"], metavar="CASE", help="(448x448)")
    work.add_argument("--images", type=Path, help="a directory of pictures")
    work.add_argument("--jsonl", type=Path, help="a file of prompts and pictures")
    work.add_argument("--turns", type=int, default=1, help="of a conversation (%(default)s)")
    work.add_argument("--prompt-words", default="16", help="16, 8-32, normal:16:4 (%(default)s)")
    work.add_argument("--output-tokens", default="32", help="same forms (%(default)s)")
    work.add_argument("--let-stop", action="store_true", help="answers may be shorter than that")
    work.add_argument("--distinct", type=int, default=0, help="different media (0: all)")
    work.add_argument("--max-tiles", type=int, help="of every picture (ours only)")
    work.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    report = parser.add_argument_group("report")
    report.add_argument("--slo-ttft", type=float, metavar="S", help="limit for goodput")
    report.add_argument("--slo-tpot", type=float, metavar="S")
    report.add_argument("--slo-latency", type=float, metavar="S")
    report.add_argument("--no-overhead", action="store_true", help="do not measure the generator")
    report.add_argument("--output", type=Path, help=f"folder (a new one in {REPORTS})")
    args = parser.parse_args(argv)
    if args.requests is None and args.duration is None:
        args.requests = 40
    if args.turns < 1 or min(args.distinct, args.warm_up, args.seed) < 0:
        parser.error("--turns is at least 1, --distinct, --warm-up and --seed at least 0")
    if not (args.timeout > 0 and math.isfinite(args.timeout)):
        parser.error("--timeout is in seconds, above 0")
    if args.images and args.jsonl:
        parser.error("give either --images or --jsonl")
    generated = ("mix", "turns", "prompt_words", "distinct", "max_tiles")
    unused = [name for name in generated if getattr(args, name) != parser.get_default(name)]
    if (args.images or args.jsonl) and unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        parser.error(f"--images and --jsonl say what is asked; leave {names} out")
    if args.concurrency and args.rate:
        parser.error("give either --concurrency (closed loop) or --rate (open loop)")
    if not args.rate:
        args.concurrency = args.concurrency or [1, 2, 4, 8]
    return args


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is started. Raises InvalidRequest."""
    _loads(args), _slo(args)
    if args.extra_body is not None:
        text, args.extra_body = args.extra_body, _json(args.extra_body)
        if not isinstance(args.extra_body, dict):
            raise InvalidRequest(f"--extra-body is {text!r}; give a JSON object")
        if not (args.target or "").startswith("http"):
            raise InvalidRequest("--extra-body is for OpenAI endpoints, --target=http://.../v1")
    args.api_key = None
    if args.api_key_variable:
        args.api_key = os.environ.get(args.api_key_variable)
        if not args.api_key:
            raise InvalidRequest(
                f"the environment has no {args.api_key_variable}, which --api-key-variable names"
            )


@program(interrupted="interrupted; the report, if a load had finished, holds those that had")
def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    _check(args)
    workload = _workload(args)
    with _target(args) as (target, metrics_url):
        run, page = measure(target, metrics_url, workload, args)
    print(f"\n{markdown_text(run)}\nreport: {page}")
    answered = sum((p.summary["requests"] or 0) - (p.summary["failed"] or 0) for p in run.points)
    if not answered:
        print("error: no request was answered", file=sys.stderr)
    return 0 if answered else 1


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
