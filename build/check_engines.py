"""Compile the vision graph of a model with TensorRT for RTX: the real parser and builder, no GPU.

    python -m build.check_engines --model demo --compute-capability SM80

It proves the graph, not the speed: the engines are thrown away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build.engines import build_engines
from build.vision_engine import EngineReport, TileProfile, build_vision_engine
from internvl_triton.errors import BuildFailed, InternVLTritonError
from internvl_triton.limits import Limits

__all__ = ["check_engine"]


def check_engine(
    onnx_path: Path,
    *,
    compute_capabilities: Sequence[str] = ("SM80",),
    max_tiles: int,
    progress: bool = True,
) -> EngineReport:
    """Compile the graph for profile 1 / 13 / max_tiles, strongly typed in bfloat16; keep nothing.

    Raises EngineBuildFailed with TensorRT's message, or BuildFailed without `tensorrt_rtx`.
    """
    try:
        import tensorrt_rtx
    except ImportError:
        raise BuildFailed(
            "the package tensorrt-rtx is not installed; it is part of the test environment: "
            "run `make test-env`, then `make check-engines`"
        ) from None
    profile = TileProfile(optimal=min(13, max_tiles), maximum=max_tiles)
    with tempfile.TemporaryDirectory() as scratch:
        return build_vision_engine(
            onnx_path,
            Path(scratch) / "vision_encoder.plan",
            profile=profile,
            trt=tensorrt_rtx,
            compute_capabilities=compute_capabilities,
            progress=progress,
        )


def format_report(report: EngineReport) -> str:
    rows = {
        "compute capability": ", ".join(report.compute_capabilities),
        "layers": str(report.num_layers),
        "weights": f"{report.weight_bytes / 1e6:.1f} MB",
        "engine": f"{report.engine_bytes / 1e6:.1f} MB",
        "tiles min/opt/max": str(report.profile),
        "compiled in": f"{report.duration_s:.1f} s",
    }
    return "\n".join(f"  {title:<20}{value:>16}" for title, value in rows.items())


def _export(model: str, artifacts_dir: Path) -> Path:
    artifacts = build_engines(model, profile="cpu", artifacts_dir=artifacts_dir, only=("vision",))
    return artifacts.vision_onnx


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build.check_engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="name or checkpoint directory")
    source.add_argument("--onnx", type=Path, metavar="FILE", help="an exported vision_encoder.onnx")
    parser.add_argument(
        "--compute-capability",
        dest="compute_capabilities",
        metavar="SM80",
        nargs="+",
        default=["SM80"],
        help="GPU architectures to compile for (default: SM80)",
    )
    parser.add_argument(
        "--max-tiles",
        type=int,
        default=Limits.max_tiles_per_request,
        help="most tiles in one run of the engine (default: %(default)s, a request's limit)",
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        onnx_path = args.onnx or _export(args.model, args.artifacts)
        report = check_engine(
            onnx_path,
            compute_capabilities=args.compute_capabilities,
            max_tiles=args.max_tiles,
        )
    except (InternVLTritonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_report(report))
    print(f"OK: TensorRT compiles the vision graph for {', '.join(report.compute_capabilities)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
