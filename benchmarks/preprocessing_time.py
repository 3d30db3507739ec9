"""Preprocessing of a picture, ours beside the model card's code and transformers' processor.

    python -m benchmarks.preprocessing_time

All three begin with the bytes of a JPEG file. Ours end in uint8 tiles, because the vision graph
normalises; the others end in normalised float32 pixel_values, as their models want them. Cells: the
median ms per picture; other / ours, median over the rounds, smallest and largest in brackets.
With n threads, n pictures are worked on at a time, each library on one thread for each. Freed
memory stays in the process, for all three, as it does in the service's step (`freed_memory.py`).
With n processes, each works on a picture of its own again and again, on one thread; they begin
together, and their pictures/s are summed. Ratios there are n processes / one, in turn.
Then: the bytes that cross each boundary of the service, measured on the tensors themselves.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from benchmarks.markdown import markdown_table
from benchmarks.option_types import at_least
from benchmarks.pictures import jpeg
from benchmarks.side_by_side import ratio_row, time_in_turn
from internvl_triton.errors import InvalidRequest
from internvl_triton.freed_memory import keep_freed_memory
from internvl_triton.limits import Limits
from internvl_triton.media import decode_image
from internvl_triton.program import program
from internvl_triton.tiling import count_tiles, tile_image

__all__ = ["boundary_rows", "preprocessors", "process_rows", "time_rows"]

SIZES = ((448, 448), (1280, 720), (1920, 1080), (3840, 2160))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS, CARD, PORT = "ours", "model card", "transformers"
_LIMITS = Limits(max_seq_len=32768)
_START_TIMEOUT_S = 120.0  # a process imports torch first


def preprocessors(pool: Executor | None = None) -> dict[str, Callable[[bytes], Any]]:
    """Name -> JPEG file to tiles. Raises InvalidRequest without torch and transformers.

    pool: threads that ours divides a picture among.
    """
    try:
        import torch
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )
    except ImportError as error:
        raise InvalidRequest(
            f"the comparison needs {error.name}, which is not installed; run `make test-env`"
        ) from error
    from PIL import Image

    from build import reference_pictures

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def transform(tile: Image.Image) -> Any:
        """torchvision's ToTensor and Normalize; its Resize returns a tile of 448x448 as it is."""
        tensor = torch.from_numpy(np.array(tile, np.uint8)).permute((2, 0, 1)).contiguous()
        return tensor.to(torch.float32).div(255).clone().sub_(mean).div_(std)

    # As InternVL's checkpoints for transformers configure it.
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=list(MEAN),
        image_std=list(STD),
    )

    def ours(data: bytes) -> Any:
        image = decode_image(data, "the picture", _LIMITS)
        return tile_image(image, max_tiles=12, tile_size=448, use_thumbnail=True, pool=pool)

    def card(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return torch.stack([transform(tile) for tile in reference_pictures(image)])

    def port(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return processor(image, return_tensors="pt")["pixel_values"]

    return {OURS: ours, CARD: card, PORT: port}


def time_rows(
    sizes: Sequence[tuple[int, int]], *, at_a_time: int, threads: int, rounds: int
) -> list[list[str]]:
    """Header, then a row per size: ms per picture with `at_a_time` pictures at a time, each of
    which ours divides among `threads` threads."""
    import torch

    head = ["picture", "tiles", f"{OURS} ms", f"{CARD} ms", "/ ours", f"{PORT} ms", "/ ours"]
    rows = [head]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_a_time) as pictures, ThreadPoolExecutor(threads) as parts:
            calls = preprocessors(parts if threads > 1 else None)
            for width, height in sizes:
                files = [jpeg(width, height, seed) for seed in range(at_a_time)]
                seconds = time_in_turn(
                    {name: _all(pictures, call, files) for name, call in calls.items()},
                    rounds=rounds,
                )
                tiles = count_tiles(width, height, max_tiles=12, tile_size=448, use_thumbnail=True)
                cells = ratio_row(seconds, scale=1 / len(files))
                rows.append([f"{width}x{height}", str(tiles), *cells])
    finally:
        torch.set_num_threads(before)
    return rows


def _all(
    pool: ThreadPoolExecutor, call: Callable[[bytes], Any], files: Sequence[bytes]
) -> Callable[[], object]:
    return lambda: list(pool.map(call, files))


def process_rows(
    sizes: Sequence[tuple[int, int]], *, processes: int, rounds: int, seconds: float = 0.5
) -> list[list[str]]:
    """Header, then a row per size: pictures/s of one process and of `processes` that work for
    `seconds` at the same time, of ours and of the model card's code."""
    head = ["picture"]
    for name in (OURS, CARD):
        head += [f"{name}, 1 process /s", f"{processes} processes /s", "ratio"]
    rows = [head]
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes, timeout=_START_TIMEOUT_S)
    with ProcessPoolExecutor(processes, context, _begin_process, (start,)) as pool:
        for width, height in sizes:
            row = [f"{width}x{height}"]
            for name in (OURS, CARD):
                alone, together = [], []
                for _ in range(rounds):
                    work = (name, width, height, seconds)
                    alone.append(pool.submit(_pictures_per_second, *work, seed=0).result())
                    futures = [
                        pool.submit(_pictures_per_second, *work, seed=seed, together=True)
                        for seed in range(processes)
                    ]
                    together.append(sum(future.result() for future in futures))
                row += scaling_cells(alone, together)
            rows.append(row)
    return rows


def scaling_cells(alone: Sequence[float], together: Sequence[float]) -> list[str]:
    """Cells: the medians, and together / alone over the rounds with its extremes in brackets."""
    ratios = np.divide(together, alone)
    ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
    return [f"{np.median(alone):.1f}", f"{np.median(together):.1f}", ratio]


_start: Barrier  # of this process of a pool


def _begin_process(start: Barrier) -> None:
    import torch

    global _start
    _start = start
    torch.set_num_threads(1)
    keep_freed_memory()


def _pictures_per_second(
    name: str, width: int, height: int, seconds: float, *, seed: int, together: bool = False
) -> float:
    """Runs in a process of the pool. together: begin when every process of it has come this far."""
    call = preprocessors()[name]
    data = jpeg(width, height, seed)
    call(data)
    if together:
        _start.wait()
    pictures, began = 0, time.perf_counter()
    while pictures == 0 or time.perf_counter() - began < seconds:
        call(data)
        pictures += 1
    return pictures / (time.perf_counter() - began)


def boundary_rows(sizes: Sequence[tuple[int, int]], *, hidden_size: int) -> list[list[str]]:
    """Header, then a row per size. Tiles as float32 are what the reference would have to pass on;
    features are those of a language model of `hidden_size`, in float32 and in bfloat16."""
    head = ["picture", "file MB", "tiles uint8 MB", "as float32 MB"]
    rows = [[*head, "visual tokens", "features float32 MB", "bfloat16 MB"]]
    for width, height in sizes:
        data = jpeg(width, height, 0)
        image = decode_image(data, "the picture", _LIMITS)
        tiles = tile_image(image, max_tiles=12, tile_size=448, use_thumbnail=True)
        tokens = 256 * len(tiles)
        sizes_bytes = [len(data), tiles.nbytes, 4 * tiles.size]
        features = [4 * tokens * hidden_size, 2 * tokens * hidden_size]
        megabytes = [f"{size / 1e6:.2f}" for size in (*sizes_bytes, *features)]
        rows.append([f"{width}x{height}", *megabytes[:3], str(tokens), *megabytes[3:]])
    return rows


def largest_difference(data: bytes) -> dict[str, float]:
    """Name -> largest difference of its pixels to ours, in steps of 1 / 255."""
    calls = preprocessors()
    tiles = calls[OURS](data).transpose(0, 3, 1, 2).astype(np.float32)
    std, mean = (np.array(values, np.float32).reshape(3, 1, 1) for values in (STD, MEAN))
    return {
        name: float(np.abs(np.asarray(calls[name](data)) * std * 255 + mean * 255 - tiles).max())
        for name in (CARD, PORT)
    }


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocessing_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=at_least(1), default=9, help="(%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=at_least(1), default=cores, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--processes", type=at_least(1), default=cores, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--hidden-size", type=at_least(1), default=4096, help="8B: 4096 (%(default)s)"
    )
    args = parser.parse_args(argv)
    preprocessors()  # what is missing is said first
    keep_freed_memory()
    for at_a_time, threads in dict.fromkeys([(1, 1), (1, args.threads), (args.threads, 1)]):
        rows = time_rows(SIZES, at_a_time=at_a_time, threads=threads, rounds=args.rounds)
        title = f"Preprocessing, {at_a_time} at a time, ours with {threads} thread(s) for each"
        print(f"{title}\n\n{markdown_table(rows)}\n")
    rows = process_rows(SIZES, processes=args.processes, rounds=args.rounds)
    print(f"Preprocessing, one thread in each process, pictures/s\n\n{markdown_table(rows)}\n")
    found = largest_difference(jpeg(1280, 720, 0))
    shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"Largest difference of a pixel to ours, in steps of 1/255: {shown}\n")
    rows = boundary_rows(SIZES, hidden_size=args.hidden_size)
    print(f"Bytes of one picture, hidden size {args.hidden_size}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
