"""Will MODEL fit on these GPUs, with which flags, and how fast can it be? Arithmetic, no GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from build.demo_checkpoint import DEMO_NAMES, demo_spec
from build.model_source import DEMO, artifact_name, is_known_name
from build.planner.deployment import Deployment
from build.planner.gpus import GPUS, named_gpu
from build.planner.precisions import KV_CACHES, PRECISIONS
from build.planner.report import plan
from build.planner.tables import print_sections
from build.planner.validation import validation
from build.planner.workload import Workload
from internvl_triton.errors import BuildFailed
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.program import program
from internvl_triton.published_models import published_config

__all__ = ["make_plan", "spec_of"]

TEXT_TOKENS = 64  # system block 37, <img> marks, chat markers and a short question
OUTPUT_TOKENS = 128
NOTE = (
    "Estimates from FLOPs, bytes and data sheets: nothing was measured. The floor is the data "
    "sheet's peak. The language model's speed was checked against published TensorRT-LLM 0.15 "
    "engines (Llama 3.1 at maximum load, bf16 and fp8) and one published InternVL2.5-4B service: "
    "see --validate. Weight-only and int8_sq speed were not checked; a single request at TP > 1 "
    "is likely to be faster than the estimate. Preprocessing and the network are not in it."
)


def spec_of(model: str) -> ModelSpec:
    """Facts of a published name, the demo, or a directory, of which only config.json is read.

    Raises UnknownModel, InvalidCheckpoint.
    """
    name = artifact_name(model)
    if not is_known_name(model):
        return ModelSpec.from_checkpoint(Path(model))
    if name in DEMO_NAMES:
        return demo_spec(name)
    return ModelSpec.from_config(published_config(name.removesuffix("-MPO")))


def make_plan(
    model: str,
    *,
    gpu: str,
    tp_size: int = 1,
    precision: str = "bf16",
    kv_cache: str = "auto",
    images: int | None = None,
    max_tiles: int | None = None,
    prompt_tokens: int = TEXT_TOKENS,
    output_tokens: int = OUTPUT_TOKENS,
    limits: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The plan of one deployment and one kind of request.

    images: of one request; given, the engines are planned for that many, else for the default
    max_tiles_per_request, and a request has one. max_tiles: of one image, without thumbnail.
    prompt_tokens: of the text. limits: fields of `Limits` that differ from their defaults.

    Raises UnknownModel, InvalidCheckpoint, InvalidTensorParallel, BuildFailed.
    """
    spec = spec_of(model)
    picture = replace(spec, max_tiles=_checked_tiles(max_tiles, spec)).max_tiles_with_thumbnail
    _check_positive("--prompt-tokens", prompt_tokens)
    _check_positive("--output-tokens", output_tokens)
    if images is not None and images < 0:
        raise BuildFailed(f"--images is {images}; it must be at least 0")
    changed = dict(limits or {})
    if images is not None:
        tiles = max(images * picture, spec.max_tiles_with_thumbnail)
        changed.setdefault("max_tiles_per_request", tiles)
    workload = Workload(1 if images is None else images, picture, prompt_tokens, output_tokens)
    deployment = Deployment.checked(
        spec,
        limits=Limits.for_model(spec, **changed),
        gpu=named_gpu(gpu),
        tp_size=tp_size,
        precision=precision,
        kv_cache=kv_cache,
    )
    _check_workload(deployment, workload)
    asked = {
        "model": artifact_name(model),
        "gpu": deployment.gpu.name,
        "tp_size": tp_size,
        "precision": precision,
        "kv_cache": kv_cache,
    }
    return {"note": NOTE, **asked, **plan(deployment, workload)}


def _checked_tiles(max_tiles: int | None, spec: ModelSpec) -> int:
    if max_tiles is None:
        return spec.max_tiles
    if not 1 <= max_tiles <= spec.max_tiles:
        raise BuildFailed(
            f"--max-tiles is {max_tiles}; this model's pictures have 1 to {spec.max_tiles} tiles"
        )
    return max_tiles


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise BuildFailed(f"{option} is {value}; it must be at least 1")


def _check_workload(deployment: Deployment, workload: Workload) -> None:
    spec, limits = deployment.spec, deployment.limits
    tokens = workload.total_tokens(spec)
    if tokens > limits.max_seq_len:
        raise BuildFailed(
            f"such a request has {tokens} tokens ({workload.num_tiles} tiles of "
            f"{spec.tokens_per_tile}, {workload.text_tokens} of text, {workload.output_tokens} of "
            f"answer), and max_seq_len is {limits.max_seq_len}: fewer --images or --max-tiles, "
            "or a larger --max-seq-len"
        )
    if workload.num_tiles > limits.max_tiles_per_request:
        raise BuildFailed(
            f"such a request has {workload.num_tiles} tiles, and max_tiles_per_request is "
            f"{limits.max_tiles_per_request}: fewer --images or --max-tiles, or a larger "
            "--max-tiles-per-request"
        )


def print_plan(report: dict[str, Any]) -> None:
    print(
        f"{report['model']} on {report['tp_size']} x {report['gpu']}, {report['precision']}, "
        f"KV cache {report['kv_cache']}"
    )
    print_sections(report)
    smallest = report["smallest_tp_size"]
    if report["fits"]:
        print(f"It fits. The smallest TP that fits is {smallest}.")
    else:
        print("It does not fit.", "What would:" if report["would_fit"] else "Nothing tried would.")
        for way in report["would_fit"]:
            print(f"  {way}")
    print(f"\n{report['note']}")


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.plan", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--gpu", default="A100-80G", help=f"{', '.join(GPUS)} (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument(
        "--precision", default="bf16", help=f"{', '.join(PRECISIONS)} (%(default)s)"
    )
    parser.add_argument("--kv-cache", default="auto", help=f"{', '.join(KV_CACHES)} (%(default)s)")
    request = parser.add_argument_group("a request")
    request.add_argument("--images", type=int, help="pictures (1)")
    request.add_argument("--max-tiles", type=int, help="tiles of a picture (the model's)")
    request.add_argument("--prompt-tokens", type=int, default=TEXT_TOKENS, help="(%(default)s)")
    request.add_argument("--output-tokens", type=int, default=OUTPUT_TOKENS, help="(%(default)s)")
    limits = parser.add_argument_group("limits, as of `python -m build.engines`")
    limits.add_argument("--batch-size", "--max-batch-size", type=int, dest="max_batch_size")
    names = ("max_seq_len", "max_kv_cache_tokens", "max_tiles_per_request", "max_tiles_per_run")
    for name in names:
        limits.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--validate", action="store_true", help="compare predictions with published throughput"
    )
    args = parser.parse_args(argv)
    if args.validate:
        report = validation()
        print(json.dumps(report, indent=2) if args.json else report["source"])
        if not args.json:
            print_sections(report)
        return 0
    given = {
        name: value
        for name in ("max_batch_size", *names)
        if (value := getattr(args, name)) is not None
    }
    report = make_plan(
        args.model,
        gpu=args.gpu,
        tp_size=args.tp_size,
        precision=args.precision,
        kv_cache=args.kv_cache,
        images=args.images,
        max_tiles=args.max_tiles,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        limits=given,
    )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_plan(report)
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
