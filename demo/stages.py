"""The training plan: what is learned when, on which pictures, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["STAGES", "Stage", "learning_rate"]

_MIX = {
    "one_tile": 0.36,
    "two_tiles": 0.11,
    "small_print": 0.15,
    "two_images": 0.13,
    "clip": 0.08,
    "text": 0.05,
    "unknown": 0.03,
    "crowd": 0.09,
}
_DENSE_MIX = {"crowd": 0.8, "one_tile": 0.1, "small_print": 0.1}


@dataclass(frozen=True)
class Stage:
    """tiles_per_step: examples are drawn until they have this many tiles.

    peak_rates: of each optimizer. dense: weight of the loss that asks every visual token what it
    shows. Without `dialogues` it is the only loss, and only the vision tower and the projector
    learn.
    """

    name: str
    tile_size: int
    steps: int
    tiles_per_step: int
    peak_rates: Mapping[str, float]
    dialogues: bool
    dense: float
    mix: Mapping[str, float]
    final: float = 0.03
    warmup_steps: int = 40


STAGES = (
    Stage("see at 224", 224, 800, 28, {"muon": 0.05, "adamw": 2e-3}, False, 1.0, _DENSE_MIX),
    Stage("talk at 224", 224, 1700, 26, {"muon": 0.025, "adamw": 2e-3}, True, 0.5, _MIX),
    Stage("talk at 448", 448, 450, 14, {"muon": 0.012, "adamw": 6e-4}, True, 0.3, _MIX),
)


def learning_rate(stage: Stage, step: int) -> float:
    """Share of the peak rates: linear warm-up, then a half cosine down to `final`."""
    warmup = min(1.0, (step + 1) / stage.warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return warmup * (stage.final + (1 - stage.final) * falling)
