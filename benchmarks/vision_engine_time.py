"""How long the vision engine takes, with nothing before it and nothing behind it.

On a GPU the plan runs again and again on tiles that are there already, with a CUDA event between
two runs: what the events are apart is the engine's time, without launches, copies and waiting. On
a CPU a call of ONNX Runtime is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import InvalidRequest
from internvl_triton.tensorrt_vision_engine import CudaEngine
from internvl_triton.vision_engine import OnnxVisionEngine

__all__ = ["VisionTime", "tile_counts", "time_cuda_engine", "time_onnx_engine"]

TILES = (1, 2, 4, 7, 13)
Tiles = NDArray[np.uint8]


@dataclass(frozen=True)
class VisionTime:
    """Runs of num_tiles tiles, in ms. call_ms: median of copy to the GPU, run and wait."""

    num_tiles: int
    median_ms: float
    p90_ms: float
    call_ms: float | None = None


def tile_counts(wanted: Sequence[int] | None, *, most: int) -> list[int]:
    """`wanted`, ascending; None: those of `TILES` that the engine takes, and `most`.

    Raises InvalidRequest for a number that the engine does not take at once.
    """
    if wanted is None:
        return [*(count for count in TILES if count < most), most]
    for count in wanted:
        if not 1 <= count <= most:
            raise InvalidRequest(f"--tiles has {count}; the engine runs 1 to {most} tiles at once")
    return sorted(set(wanted))


def time_cuda_engine(
    engine: CudaEngine, counts: Sequence[int], *, rounds: int, warm_up: int
) -> list[VisionTime]:
    """One entry per number of tiles."""

    def measured(count: int) -> VisionTime:
        tiles = _tiles(count, engine.tile_size)

        def call() -> None:
            engine.start(tiles)
            engine.wait()

        calls = _wall_clock_ms(call, rounds=rounds, warm_up=warm_up)
        runs = _event_ms(engine, tiles, rounds=rounds, warm_up=warm_up)
        return _summary(count, runs, call_ms=float(np.median(calls)))

    return [measured(count) for count in counts]


def time_onnx_engine(
    engine: OnnxVisionEngine, counts: Sequence[int], *, rounds: int, warm_up: int
) -> list[VisionTime]:
    """One entry per number of tiles."""

    def measured(count: int) -> VisionTime:
        tiles = _tiles(count, engine.tile_size)
        return _summary(
            count, _wall_clock_ms(lambda: engine.encode(tiles), rounds=rounds, warm_up=warm_up)
        )

    return [measured(count) for count in counts]


def _event_ms(engine: CudaEngine, tiles: Tiles, *, rounds: int, warm_up: int) -> list[float]:
    """The GPU's own clock. Runs are queued behind the warm-up, so the GPU waits for nothing."""
    import torch

    batch = engine.upload(tiles)
    with torch.cuda.device(engine.device):
        new_event: Callable[..., Any] = torch.cuda.Event
        events = [new_event(enable_timing=True) for _ in range(rounds + 1)]
    for _ in range(warm_up):
        engine.run(batch)
    events[0].record(engine.stream)
    for event in events[1:]:
        engine.run(batch)
        event.record(engine.stream)
    engine.wait()
    return [first.elapsed_time(second) for first, second in pairwise(events)]


def _wall_clock_ms(call: Callable[[], object], *, rounds: int, warm_up: int) -> list[float]:
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def _summary(count: int, times_ms: Sequence[float], call_ms: float | None = None) -> VisionTime:
    median, p90 = (float(value) for value in np.percentile(times_ms, (50, 90)))
    return VisionTime(count, median, p90, call_ms)


def _tiles(count: int, size: int) -> Tiles:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
