"""Peak memory of the conversion at real width and growing depth: it must not grow.

    python -m benchmarks.conversion_memory

Checkpoints are zeros in sparse files, so they cost no disk; the converted ones do. Every run is a
fresh process, and its peak is that process's VmHWM, mapped file pages included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from internvl_triton.errors import BuildFailed
from internvl_triton.program import program
from internvl_triton.published_models import PUBLISHED_MODELS, published_config

DEPTHS = (2, 8, 24)
TP_SIZES = (1, 2)
FLAT = 1.15  # largest / smallest peak of one conversion at different depths
WORK_DIR = Path("artifacts") / "benchmarks" / "conversion_memory"


@dataclass(frozen=True)
class Run:
    conversion: str  # "language model, TP 2"
    num_layers: int
    written_bytes: int
    seconds: float
    peak_bytes: int


def is_flat(runs: list[Run]) -> bool:
    """Whether the largest peak of these runs is at most FLAT times the smallest."""
    peaks = [run.peak_bytes for run in runs]
    return max(peaks) <= FLAT * min(peaks)


def measure(work_dir: Path, model: str) -> list[Run]:
    """Convert `model` at every depth and TP size. Raises BuildFailed when the disk is too small."""
    work_dir.mkdir(parents=True, exist_ok=True)
    _check_disk(work_dir, model)
    runs = []
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch:
        for depth in DEPTHS:
            checkpoint = _sparse_checkpoint(Path(scratch), model, depth)
            for tp_size in TP_SIZES:
                arguments = (checkpoint, Path(scratch) / "out", tp_size)
                runs.append(_run(f"language model, TP {tp_size}", depth, convert_llm, *arguments))
            arguments = (checkpoint, Path(scratch) / "out", 0)
            runs.append(_run("vision tower", depth, convert_vision, *arguments))
            shutil.rmtree(checkpoint)
    return sorted(runs, key=lambda run: (run.conversion, run.num_layers))


def convert_llm(checkpoint: Path, output: Path, tp_size: int) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process."""
    from export import export_llm

    started = time.perf_counter()
    export_llm(checkpoint, output, tp_size=tp_size, progress=False)
    return time.perf_counter() - started, peak_bytes()


def convert_vision(checkpoint: Path, output: Path, _: int) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process."""
    from export import export_vision

    started = time.perf_counter()
    export_vision(checkpoint, output, progress=False)
    return time.perf_counter() - started, peak_bytes()


def peak_bytes() -> int:
    """Peak RSS of this process.

    Not ru_maxrss: that of a child begins at the peak of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # "VmHWM:   2192 kB"


def _run(
    conversion: str,
    depth: int,
    convert: Callable[[Path, Path, int], tuple[float, int]],
    checkpoint: Path,
    output: Path,
    tp_size: int,
) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        seconds, peak_bytes = fresh_process.submit(convert, checkpoint, output, tp_size).result()
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    shutil.rmtree(output)
    return Run(conversion, depth, written, seconds, peak_bytes)


def _sparse_checkpoint(scratch: Path, model: str, depth: int) -> Path:
    from internvl_triton.random_checkpoint import write_random_checkpoint

    total = int(PUBLISHED_MODELS[model][0]["num_hidden_layers"])
    config = published_config(model, vision_layers=min(depth, total), llm_layers=depth)
    return write_random_checkpoint(scratch / "checkpoint", config, zeros=True, tokenizer=False)


def _check_disk(work_dir: Path, model: str) -> None:
    from math import prod

    from internvl_triton.checkpoint_layout import llm_shapes
    from internvl_triton.model_spec import ModelSpec

    spec = ModelSpec.from_config(published_config(model, llm_layers=max(DEPTHS))).llm
    weights = sum(prod(shape) for shape in llm_shapes(spec).values())
    weights += (max(TP_SIZES) - 1) * spec.vocab_size * spec.hidden_size  # the embedding is copied
    needed, free = int(2 * weights * 1.1), shutil.disk_usage(work_dir).free
    if free < needed:
        raise BuildFailed(
            f"{work_dir} has {free / 1e9:.1f} GB free, the deepest conversion needs "
            f"{needed / 1e9:.1f} GB; give another --work-dir"
        )


def report(runs: list[Run], model: str) -> bool:
    """Print the table and a verdict per conversion; whether all are flat."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Conversion of {model}, bf16, real width")
    table.add_column("conversion")
    for column in ("layers", "written GB", "time s", "GB/s", "peak RSS MB"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.conversion,
            str(run.num_layers),
            f"{run.written_bytes / 1e9:.2f}",
            f"{run.seconds:.1f}",
            f"{run.written_bytes / 1e9 / run.seconds:.2f}",
            f"{run.peak_bytes / 1e6:.0f}",
        )
    console = Console()
    console.print(table)
    verdicts = []
    for conversion in dict.fromkeys(run.conversion for run in runs):
        group = [run for run in runs if run.conversion == conversion]
        peaks = [run.peak_bytes for run in group]
        verdicts.append(is_flat(group))
        console.print(
            f"{conversion}: largest / smallest peak = {max(peaks) / min(peaks):.3f}, "
            f"{'flat' if verdicts[-1] else 'NOT flat'} (at most {FLAT})"
        )
    return all(verdicts)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion_memory",
        description="Peak memory of the conversion at 2, 8 and 24 layers of real width.",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="where to write, about 15 GB at a time, removed afterwards (default: %(default)s)",
    )
    parser.add_argument(
        "--model", default="InternVL2_5-8B", choices=PUBLISHED_MODELS, help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    flat = report(measure(args.work_dir, args.model), args.model)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
