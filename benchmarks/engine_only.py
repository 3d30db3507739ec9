"""The engines of a build alone, beside what its GPUs could do at most.

    python -m benchmarks.engine_only --model InternVL2_5-8B --tp-size 2

Vision: runs of 1, 2, 4, 7, 13 tiles and of as many as the engine takes, on one GPU. Language model:
`trtllm-bench`, which is in the gpu profile's container, with prompts of pictures of --llm-tiles
tiles and their question; `latency` one by one with CUDA graphs, `throughput` --at-a-time as the
service runs. Floors are the planner's (`make plan`), at every peak of the data sheet; those of
TTFT and of a step are of requests that wait for nobody.

In the cpu profile only the vision engine is timed, in ONNX Runtime; `make bench-engines` compares
both CPU engines with PyTorch. Stop the service before: it holds the GPU's memory and disturbs.

Writes results.json and trtllm-bench's logs and reports to a folder in artifacts/benchmarks.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import trtllm_bench
from benchmarks.engine_tables import llm_floors, llm_rows, vision_rows
from benchmarks.environment import DISTURBED, describe_environment
from benchmarks.gpu_use import GpuUse
from benchmarks.markdown import markdown_table
from benchmarks.trtllm_bench import Case, LlmTime
from benchmarks.vision_engine_time import (
    VisionTime,
    tile_counts,
    time_cuda_engine,
    time_onnx_engine,
)
from internvl_triton.errors import InvalidRequest
from internvl_triton.limits import Limits
from internvl_triton.program import program

if TYPE_CHECKING:
    from build import MeasuredBuild

__all__ = ["llm_cases", "main", "run_llm", "vision_times"]

IDLE_MIB = 1500  # of a GPU that nothing runs on, at most
TEXT_TOKENS = 64  # system block, <img> marks and a short question, as `make plan` has it


def vision_times(
    built: MeasuredBuild, wanted: Sequence[int] | None, *, rounds: int, warm_up: int
) -> list[VisionTime]:
    """Of the build's vision engine. Raises InvalidRequest, ArtifactMismatch, EngineError."""
    if built.profile == "cpu":
        from internvl_triton.vision_engine import OnnxVisionEngine

        onnx_engine = OnnxVisionEngine(built.artifacts.vision_onnx)
        counts = tile_counts(wanted, most=built.artifacts.spec().max_tiles_with_thumbnail)
        return time_onnx_engine(onnx_engine, counts, rounds=rounds, warm_up=warm_up)
    import tensorrt
    import torch

    from internvl_triton.tensorrt_vision_engine import CudaEngine

    engine = CudaEngine(built.artifacts.vision_plan.read_bytes(), 0, trt=tensorrt)
    try:
        counts = tile_counts(wanted, most=engine.max_tiles)
        return time_cuda_engine(engine, counts, rounds=rounds, warm_up=warm_up)
    finally:  # trtllm-bench takes 90 % of what is free
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def llm_cases(
    tiles: Sequence[int] | None,
    at_a_time: Sequence[int] | None,
    *,
    tokens_per_tile: int,
    output_tokens: int,
    waves: int,
    limits: Limits,
) -> list[Case]:
    """For every number of tiles `latency`, then `throughput` at each concurrency.

    tiles, at_a_time: None takes 1 and 13, 1 and 8, or what the engine was built for.
    waves: requests per place. Raises InvalidRequest for what it was not built for.
    """
    room = limits.max_seq_len - TEXT_TOKENS - output_tokens
    if tiles is None:
        tiles = [count for count in (1, 13) if count * tokens_per_tile <= room]
    if at_a_time is None:
        at_a_time = sorted({1, min(8, limits.max_batch_size)})
    cases = []
    for count in tiles:
        prompt_tokens = count * tokens_per_tile + TEXT_TOKENS
        if count < 0 or count * tokens_per_tile > room:
            raise InvalidRequest(
                f"--llm-tiles has {count}: {prompt_tokens} + {output_tokens} tokens, and the "
                f"engine takes up to {limits.max_seq_len}"
            )
        length = (count, prompt_tokens, output_tokens)
        cases.append(Case("latency", *length, concurrency=1, requests=2 * waves))
        for number in at_a_time:
            if not 1 <= number <= limits.max_batch_size:
                raise InvalidRequest(
                    f"--at-a-time has {number}; the engine was built for 1 to "
                    f"{limits.max_batch_size}"
                )
            requests = max(2, number) * waves
            cases.append(Case("throughput", *length, concurrency=number, requests=requests))
    return cases


def run_llm(built: MeasuredBuild, cases: Sequence[Case], folder: Path) -> list[LlmTime]:
    """One entry per case. Raises BuildFailed with the end of trtllm-bench's log."""
    from build import run_logged

    spec = built.artifacts.spec().llm
    program = shutil.which(trtllm_bench.PROGRAM)
    assert program is not None, "ask before"
    stand_in = trtllm_bench.write_stand_in(
        folder / "stand-in", spec, dtype=_engine_dtype(built.artifacts.llm_engine(built.llm))
    )
    options: dict[str, list[str]] = {}
    times = []
    for number, case in enumerate(cases, start=1):
        if case.command not in options:
            text = trtllm_bench.read_help(program, case.command)
            options[case.command] = trtllm_bench.engine_options(case, text)
        print(f"[{number}/{len(cases)}] {trtllm_bench.PROGRAM} {case.name} ...", flush=True)
        dataset, report = folder / f"{case.name}.jsonl", folder / f"{case.name}.json"
        report.unlink(missing_ok=True)
        lines = trtllm_bench.request_lines(case, vocab_size=spec.vocab_size)
        dataset.write_text("\n".join([*lines, ""]), encoding="utf-8")
        command = trtllm_bench.command_line(
            program,
            case,
            model=built.artifacts.name,
            stand_in=stand_in.resolve(),
            engine=built.artifacts.llm_engine(built.llm).resolve(),
            dataset=dataset.resolve(),
            report=report.resolve(),
            options=options[case.command],
        )
        run_logged(trtllm_bench.PROGRAM, command, folder / f"{case.name}.log")
        times.append(trtllm_bench.read_report(report, case))
    return times


def _engine_dtype(engine: Path) -> str:
    config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
    return str(config["pretrained_config"]["dtype"])


def _measure(args: argparse.Namespace, folder: Path) -> None:
    """Both parts, each printed and kept as soon as it is there. Raises InternVLTritonError."""
    from build import floors_of, measured_build

    environment = describe_environment()
    tiles = _numbers("--tiles", args.tiles)
    llm_tiles = _numbers("--llm-tiles", args.llm_tiles)
    at_a_time = _numbers("--at-a-time", args.at_a_time)
    built = measured_build(
        args.model,
        tp_size=args.tp_size,
        profile=args.profile,
        precision=args.precision,
        kv_cache=args.kv_cache,
        artifacts_dir=args.artifacts,
    )
    spec = built.artifacts.spec()
    cases = llm_cases(
        llm_tiles,
        at_a_time,
        tokens_per_tile=spec.tokens_per_tile,
        output_tokens=args.output_tokens,
        waves=args.waves,
        limits=built.artifacts.limits(),
    )
    floors, sentence = floors_of(spec, built.llm, profile=built.profile, gpu=args.gpu)
    results: dict[str, Any] = {
        "model": built.artifacts.name,
        "build": built.llm.name,
        "profile": built.profile,
        "floors": sentence,
        "environment": environment,
    }
    print(f"\n{built.artifacts.name}, {built.llm.name}, {built.profile} profile. {sentence}")
    for warning in _warnings(environment):
        print(f"Careful: {warning}.")
    if args.part != "llm":
        times = vision_times(built, tiles, rounds=args.rounds, warm_up=args.warm_up)
        runtime = "TensorRT, GPU 0" if built.profile == "gpu" else "ONNX Runtime"
        table = markdown_table(vision_rows(times, floors))
        print(f"\nVision engine, {runtime}, {args.rounds} runs, ms\n\n{table}")
        results["vision"] = [
            asdict(each) | ({"floor_ms": 1000 * floors.vision_s(each.num_tiles)} if floors else {})
            for each in times
        ]
        _write(folder, results)
    if args.part == "vision":
        return
    if why_not := _no_llm(built.profile):
        print(f"\nLanguage model: {why_not}")
        return
    print(flush=True)
    llm_times = run_llm(built, cases, folder)
    table = markdown_table(llm_rows(cases, llm_times, floors))
    print(f"\nLanguage model's engine, {trtllm_bench.PROGRAM}, means\n\n{table}")
    results["llm"] = [
        {**asdict(case), **asdict(each)} | ({"floors": llm_floors(case, floors)} if floors else {})
        for case, each in zip(cases, llm_times, strict=True)
    ]
    _write(folder, results)


def _warnings(environment: dict[str, str]) -> list[str]:
    """What makes the numbers doubtful."""
    found = [f"{DISTURBED} {environment[DISTURBED]}"] if DISTURBED in environment else []
    with GpuUse(period_ms=200) as before:
        if environment["GPUs"] != "none":
            time.sleep(1.0)
    for index, use in before.mean().items():
        if (used := use.get("memory_mib", 0.0)) > IDLE_MIB:
            found.append(
                f"GPU {index} has {used:,.0f} MiB in use before anything was measured; stop the "
                "service and other programs"
            )
    return found


def _no_llm(profile: str) -> str | None:
    """Why there is no number of the language model, or None."""
    if profile == "cpu":
        return "not timed in the cpu profile; `make bench-engines` times its CPU engine."
    if shutil.which(trtllm_bench.PROGRAM) is None:
        return (
            f"{trtllm_bench.PROGRAM} is not on PATH; it is part of TensorRT-LLM, in the gpu "
            "profile's container."
        )
    return None


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Of "1,8". One word, because it is passed on to the container. Raises InvalidRequest."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(f"{option} is {text!r}; give numbers with commas: 1,7,13") from None


@program(interrupted="interrupted; what was printed is kept")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_only", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="name or directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--profile", help="gpu or cpu (gpu where there is one)")
    parser.add_argument("--precision", help="of the language model (the checkpoint's)")
    parser.add_argument("--kv-cache", help="of the engine: fp8 or int8 (16 bits)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--gpu", help="the planner's name of these GPUs (what nvidia-smi says)")
    parser.add_argument("--part", choices=("all", "vision", "llm"), default="all")
    vision = parser.add_argument_group("vision engine")
    vision.add_argument("--tiles", metavar="N,N", help="of a run (1,2,4,7,13 and the most)")
    vision.add_argument("--rounds", type=int, default=50, help="timed runs (%(default)s)")
    vision.add_argument("--warm-up", type=int, default=5, help="untimed ones (%(default)s)")
    llm = parser.add_argument_group("language model")
    llm.add_argument("--llm-tiles", metavar="N,N", help="of a prompt's pictures (1,13)")
    llm.add_argument("--at-a-time", metavar="N,N", help="requests (1,8)")
    llm.add_argument("--output-tokens", type=int, default=128, help="(%(default)s)")
    llm.add_argument("--waves", type=int, default=4, help="requests per place (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.waves) < 1 or args.output_tokens < 2 or args.warm_up < 0:
        parser.error("--rounds, --waves: at least 1; --output-tokens: 2; --warm-up: 0")
    from build import artifact_name, enter_container

    enter_container("benchmarks.engine_only", args)
    name = f"{artifact_name(args.model)}-tp{args.tp_size}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = args.artifacts / "benchmarks" / "engine_only" / name
    _measure(args, folder)
    print(f"\nresults: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
