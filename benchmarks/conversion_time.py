"""Time and peak memory of converting InternVL2_5-2B whole and -26B at 4 layers.

    python -m benchmarks.conversion_time

Beside each conversion (both models, TP 1) stands copying the checkpoint's files, the least that any
conversion could do; both end when the disk has the bytes, and each conversion is compared with the
copies before and after it, because a disk's speed changes by a factor. Checkpoints have real widths
and random weights, so no file is sparse. Every run is a fresh process; its peak is its VmHWM,
mapped file pages included. Cells: medians over the rounds; the ratio's extremes in brackets.

Then the language model alone, beside loading it with transformers, which NVIDIA's conversion
scripts do first: `from_pretrained` on the CPU in the checkpoint's dtype, of a directory with the
same bytes that `export_hf_llm` wrote before, InternLM2 as the Llama that it is, since transformers
has no InternLM2. `from_pretrained` only maps the file, so the load ends when every page of every
weight was touched. It computes and writes nothing; the conversion also writes as much as it reads,
onto the disk. Imports are not timed, but their memory is in the peaks (torch and transformers:
0.35 GB). Cold: the kernel dropped the files from its cache before; warm: they were just read.
"""

from __future__ import annotations

import argparse
import json
import mmap
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
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.conversion_memory import peak_bytes
from benchmarks.markdown import markdown_table
from benchmarks.option_types import at_least
from internvl_triton.errors import BuildFailed, InvalidRequest
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


@dataclass(frozen=True)
class BesideLoading:
    """The language model converted and loaded; a time of each per round."""

    file_cache: str  # "cold" or "warm"
    llm_bytes: int
    conversions_s: tuple[float, ...]
    loads_s: tuple[float, ...]
    conversion_peak_bytes: int
    load_peak_bytes: int

    @property
    def ratios(self) -> list[float]:
        """Each conversion's time to that of the load after it."""
        return [own / load for own, load in zip(self.conversions_s, self.loads_s, strict=True)]


def measure(
    work_dir: Path, model: str, layers: int | None, *, rounds: int
) -> tuple[Measured, list[BesideLoading]]:
    """Write the checkpoint, convert it, remove both. Raises BuildFailed: the disk is too small."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch:
        checkpoint = _random_checkpoint(Path(scratch) / "checkpoint", model, layers)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        # A whole conversion, or the language model twice.
        free, needed = shutil.disk_usage(work_dir).free, 2.1 * size
        if free < needed:
            raise BuildFailed(
                f"{work_dir} has {free / 1e9:.1f} GB free, converting {model} needs "
                f"{needed / 1e9:.1f} GB more; give another --work-dir"
            )
        copies, conversions = _beside_copying(checkpoint, Path(scratch) / "out", rounds)
        beside_loading = measure_loading(checkpoint, Path(scratch), rounds=rounds)
    depth = "all" if layers is None else str(layers)
    measured = Measured(
        model,
        depth,
        size,
        tuple(seconds for seconds, _ in copies),
        tuple(seconds for seconds, _ in conversions),
        max(peak for _, peak in conversions),
    )
    return measured, beside_loading


def _beside_copying(
    checkpoint: Path, output: Path, rounds: int
) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    copies = [_write(copy, checkpoint, output)]
    conversions = []
    for _ in range(rounds):
        conversions.append(_write(convert, checkpoint, output))
        copies.append(_write(copy, checkpoint, output))
    return copies, conversions


def measure_loading(checkpoint: Path, scratch: Path, *, rounds: int) -> list[BesideLoading]:
    """Convert and load the language model in turn, with a cold and with a warm file cache.

    `scratch` is left with a copy of the language model.
    """
    directory = scratch / "transformers"
    _run(write_for_transformers, checkpoint, directory)
    llm_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    rows = []
    for file_cache, prepare in (("cold", _drop_from_cache), ("warm", _read_into_cache)):
        conversions, loads = [], []
        for _ in range(rounds):
            prepare(checkpoint)
            conversions.append(_write(convert_llm, checkpoint, scratch / "out"))
            prepare(directory)
            loads.append(_run(load, directory))
        rows.append(
            BesideLoading(
                file_cache,
                llm_bytes,
                tuple(seconds for seconds, _ in conversions),
                tuple(seconds for seconds, _ in loads),
                max(peak for _, peak in conversions),
                max(peak for _, peak in loads),
            )
        )
    return rows


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


def convert_llm(checkpoint: Path, output: Path) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process."""
    from export import export_llm

    started = time.perf_counter()
    export_llm(checkpoint, output, tp_size=1, progress=False)
    _flush(output)
    return time.perf_counter() - started, peak_bytes()


def write_for_transformers(checkpoint: Path, output: Path) -> None:
    from export import export_hf_llm

    export_hf_llm(checkpoint, output, as_llama=True, progress=False)
    _flush(output)


def load(directory: Path) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of this process, all weights in memory."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model_class = getattr(transformers, config["architectures"][0])
    started = time.perf_counter()
    model = model_class.from_pretrained(directory, dtype="auto")  # maps the file, reads nothing
    for weight in model.parameters():
        weight.detach().view(-1)[:: mmap.PAGESIZE // weight.element_size()].sum()
    return time.perf_counter() - started, peak_bytes()


def _read_into_cache(directory: Path) -> None:
    block = bytearray(2**20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _run(work: Callable[..., Any], *arguments: Path) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        return fresh_process.submit(work, *arguments).result()


def _write(
    work: Callable[[Path, Path], tuple[float, int]], checkpoint: Path, output: Path
) -> tuple[float, int]:
    result: tuple[float, int] = _run(work, checkpoint, output)
    shutil.rmtree(output)
    return result


def _random_checkpoint(directory: Path, model: str, layers: int | None) -> Path:
    """Random bf16 numbers between -2 and 2 behind true headers."""
    from internvl_triton.random_checkpoint import write_random_checkpoint
    from internvl_triton.tiny_tokenizer import write_tiny_tokenizer

    config = published_config(model, vision_layers=layers, llm_layers=layers)
    write_random_checkpoint(directory, config, zeros=True, tokenizer=False)
    # export_hf_llm wants a tokenizer; its size matters to nothing here.
    family = config["llm_config"]["model_type"]
    write_tiny_tokenizer(directory, family=family, vocab_size=1000)
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
    table = [["model", "layers", "GB", "copy s", "convert s", "ratio", "peak RSS GB"]]
    table += [
        [
            row.model,
            row.layers,
            f"{row.checkpoint_bytes / 1e9:.2f}",
            f"{median(row.copies_s):.1f}",
            f"{median(row.conversions_s):.1f}",
            f"{median(row.ratios):.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in rows
    ]
    title = "Conversion to ONNX and to a TensorRT-LLM checkpoint, bf16, TP 1, beside copying"
    print(f"{title}\n\n{markdown_table(table)}\n")
    fine = all(row.within_limits for row in rows)
    print(
        f"limits: ratio {MAX_RATIO:g}, peak {MAX_PEAK_BYTES / 1e9:g} GB: "
        f"{'all within' if fine else 'NOT all within'}"
    )
    return fine


def loading_rows(measured: list[tuple[Measured, list[BesideLoading]]]) -> list[list[str]]:
    """Header, then two rows per model: times, and peaks, of the conversion and of the load."""
    head = ["language model", "layers", "GB", "file cache", "convert s", "load s", "ratio"]
    rows = [[*head, "convert MB", "load MB", "ratio"]]
    for conversion, caches in measured:
        for row in caches:
            rows.append(
                [
                    conversion.model,
                    conversion.layers,
                    f"{row.llm_bytes / 1e9:.2f}",
                    row.file_cache,
                    f"{median(row.conversions_s):.2f}",
                    f"{median(row.loads_s):.2f}",
                    f"{median(row.ratios):.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})",
                    f"{row.conversion_peak_bytes / 1e6:.0f}",
                    f"{row.load_peak_bytes / 1e6:.0f}",
                    f"{row.conversion_peak_bytes / row.load_peak_bytes:.2f}",
                ]
            )
    return rows


def check_packages() -> None:
    """Raises InvalidRequest without torch and transformers."""
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise InvalidRequest(
                f"the comparison needs {name}, which is not installed; run `make test-env`"
            )


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
        help="where to write, about 22 GB at a time, removed afterwards (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="conversions (%(default)s)")
    args = parser.parse_args(argv)
    check_packages()
    measured = [
        measure(args.work_dir, model, layers, rounds=args.rounds) for model, layers in CASES
    ]
    fine = report([conversion for conversion, _ in measured])
    print(
        "\nConversion of the language model, beside loading it with transformers\n\n"
        f"{markdown_table(loading_rows(measured))}\n\n"
        "The load maps the file and writes nothing; the conversion ends when the disk has its own."
    )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
