"""Time and peak memory of converting InternVL2_5-2B whole and -26B at 4 layers.

    python -m benchmarks.conversion_time

Beside each conversion (both models, TP 1) stands copying the checkpoint's files, the least that any
conversion could do; both end when the disk has the bytes, and each conversion is compared with the
copies before and after it, because a disk's speed changes by a factor. Checkpoints have real widths
and random weights, so no file is sparse. Every run is a fresh process; its peak is its ru_maxrss,
mapped file pages included. Cells: medians over the rounds; the ratio's extremes in brackets.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.conversion_memory import peak_bytes
from internvl_triton.errors import BuildFailed
from internvl_triton.program import program
from internvl_triton.published_models import published_config

MAX_PEAK_BYTES = 3 * 10**9
MAX_RATIO = 3.0  # of the conversion's time to the copy's
CASES = (("InternVL2_5-2B", None), ("InternVL2_5-26B", 4))  # name, layers of both towers
WORK_DIR = Path("artifacts") / "benchmarks" / "conversion_time"
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Measured:
    """copies_s: one before each conversion and one after the last."""

    model: str
    layers: str
    checkpoint_bytes: int
    copies_s: tuple[float, ...]
    conversions_s: tuple[float, ...]
    peak_bytes: int

    @property
    def ratios(self) -> list[float]:
        """Each conversion's time to the mean of the copies beside it."""
        beside = [sum(pair) / 2 for pair in pairwise(self.copies_s)]
        return [own / copy for own, copy in zip(self.conversions_s, beside, strict=True)]

    @property
    def within_limits(self) -> bool:
        return median(self.ratios) <= MAX_RATIO and self.peak_bytes < MAX_PEAK_BYTES


def measure(work_dir: Path, model: str, layers: int | None, *, rounds: int) -> Measured:
    """Write the checkpoint, convert it, remove both. Raises BuildFailed: the disk is too small."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch:
        checkpoint = _random_checkpoint(Path(scratch) / "checkpoint", model, layers)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        free = shutil.disk_usage(work_dir).free
        if free < 1.1 * size:
            raise BuildFailed(
                f"{work_dir} has {free / 1e9:.1f} GB free, converting {model} needs "
                f"{1.1 * size / 1e9:.1f} GB more; give another --work-dir"
            )
        output = Path(scratch) / "out"
        copies = [_run(copy, checkpoint, output)]
        conversions = []
        for _ in range(rounds):
            conversions.append(_run(convert, checkpoint, output))
            copies.append(_run(copy, checkpoint, output))
    depth = "all" if layers is None else str(layers)
    return Measured(
        model,
        depth,
        size,
        tuple(seconds for seconds, _ in copies),
        tuple(seconds for seconds, _ in conversions),
        max(peak for _, peak in conversions),
    )


def copy(checkpoint: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process."""
    started = time.perf_counter()
    output.mkdir()
    for path in checkpoint.iterdir():
        shutil.copyfile(path, output / path.name)
    _flush(output)
    return time.perf_counter() - started, peak_bytes()


def convert(checkpoint: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process."""
    from export import export_llm, export_vision

    started = time.perf_counter()
    export_vision(checkpoint, output / "vision", progress=False)
    export_llm(checkpoint, output / "llm", tp_size=1, progress=False)
    _flush(output)
    return time.perf_counter() - started, peak_bytes()


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _run(
    work: Callable[[Path, Path], tuple[float, int]], checkpoint: Path, output: Path
) -> tuple[float, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        result = fresh_process.submit(work, checkpoint, output).result()
    shutil.rmtree(output)
    return result


def _random_checkpoint(directory: Path, model: str, layers: int | None) -> Path:
    """Random bf16 numbers between -2 and 2 behind true headers."""
    from internvl_triton.random_checkpoint import write_random_checkpoint

    config = published_config(model, vision_layers=layers, llm_layers=layers)
    write_random_checkpoint(directory, config, zeros=True, tokenizer=False)
    bits = np.frombuffer(os.urandom(BLOCK_BYTES), np.uint16)
    block = (bits & np.uint16(0xBFFF)).tobytes()  # without an exponent's largest bit
    with (directory / "model.safetensors").open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        end = os.fstat(file.fileno()).st_size
        file.seek(8 + header_bytes)
        while (rest := end - file.tell()) > 0:
            file.write(block[:rest])
        os.fsync(file.fileno())
    return directory


def report(rows: list[Measured]) -> bool:
    """Print the table; whether all are within the limits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Conversion to ONNX and to a TensorRT-LLM checkpoint, bf16, TP 1")
    table.add_column("model", no_wrap=True)
    for column in ("layers", "GB", "copy s", "convert s", "ratio", "peak RSS GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            row.layers,
            f"{row.checkpoint_bytes / 1e9:.2f}",
            f"{median(row.copies_s):.1f}",
            f"{median(row.conversions_s):.1f}",
            f"{median(row.ratios):.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})",
            f"{row.peak_bytes / 1e9:.2f}",
        )
    console = Console()
    console.print(table)
    fine = all(row.within_limits for row in rows)
    console.print(
        f"limits: ratio {MAX_RATIO:g}, peak {MAX_PEAK_BYTES / 1e9:g} GB: "
        f"{'all within' if fine else 'NOT all within'}"
    )
    return fine


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion_time",
        description="Time and peak memory of converting 2B whole and 26B at 4 layers.",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="where to write, about 16 GB at a time, removed afterwards (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="conversions (%(default)s)")
    args = parser.parse_args(argv)
    fine = report(
        [measure(args.work_dir, model, layers, rounds=args.rounds) for model, layers in CASES]
    )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
