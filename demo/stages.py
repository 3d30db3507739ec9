"""The training plan: what is learned when, on which pictures, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["STAGES", "Stage", "learning_rate"]

# The kinds that are learned last have more than their share.
_MIX = {
    "one_tile": 0.2,
    "two_tiles": 0.1,
    "small_print": 0.2,
    "two_images": 0.22,
    "clip": 0.2,
    "text": 0.05,
    "unknown": 0.03,
}
_DENSE_MIX = {"crowd": 0.8, "one_tile": 0.1, "small_print": 0.1}


Learner = Literal["tower", "language"]


@dataclass(frozen=True)
class Stage:
    """tiles_per_step: examples are drawn until they have this many tiles.

    learns: the vision tower and the projector, from what every visual token should show; or the
    language model, from questions and answers, while the tower stands still. peak_rates: of each
    optimizer. decay: see `Muon`.
    """

    name: str
    learns: Learner
    tile_size: int
    steps: int
    tiles_per_step: int
    peak_rates: Mapping[str, float]
    mix: Mapping[str, float]
    final: float = 0.03
    decay: float = 0.01
    warmup_steps: int = 40

    def teaches(self, name: str) -> bool:
        """Whether the weight of this name learns."""
        of_language = name.startswith(("language_model.", "word.", "source."))
        return of_language == (self.learns == "language")

    @property
    def has_dialogues(self) -> bool:
        return self.learns == "language"

    @property
    def has_labels(self) -> bool:
        return self.learns == "tower"


# To tell two things in one picture apart is learned first, and three times faster without the rest;
# then where, of several pictures, tiles or frames, a thing is.
_ONE_MIX = {"one_tile": 0.9, "text": 0.07, "unknown": 0.03}
_SEVERAL_MIX = {"clip": 0.4, "two_images": 0.35, "small_print": 0.2, "text": 0.05}
_WHICH_MIX = {"two_images": 0.4, "small_print": 0.38, "clip": 0.1, "one_tile": 0.07, "text": 0.05}
_LAST_MIX = {**_MIX, "small_print": 0.26, "clip": 0.14}
_FINE_MIX = {**_MIX, "one_tile": 0.24, "two_tiles": 0.14, "clip": 0.12}
_WEAK_MIX = {**_MIX, "one_tile": 0.32, "two_tiles": 0.14, "small_print": 0.26, "clip": 0.04}
_PAIR_MIX = {**_WEAK_MIX, "two_images": 0.4}
_MOST_PAIRS = {**_WEAK_MIX, "two_images": 0.7}
_FAST, _MIDDLE = {"muon": 0.03, "adamw": 1.5e-3}, {"muon": 0.025, "adamw": 1.2e-3}
_SLOW, _FINE = {"muon": 0.01, "adamw": 7e-4}, {"muon": 0.007, "adamw": 5e-4}
_LAST = {"muon": 0.0025, "adamw": 2e-4}

STAGES = (
    Stage("see at 224", "tower", 224, 1000, 28, {"muon": 0.05, "adamw": 2e-3}, _DENSE_MIX),
    Stage("see at 448", "tower", 448, 140, 10, {"muon": 0.01, "adamw": 4e-4}, _DENSE_MIX),
    Stage("talk of one tile", "language", 224, 200, 16, _FAST, _ONE_MIX, 0.5, 0.3),
    Stage("talk of several", "language", 224, 250, 24, _FAST, _SEVERAL_MIX, 0.5, 0.3),
    Stage("talk at 224", "language", 224, 400, 24, _MIDDLE, _MIX, 0.15, 0.3),
    Stage("talk of which one", "language", 224, 250, 24, _MIDDLE, _WHICH_MIX, 0.3, 0.3),
    Stage("talk at 448", "language", 448, 300, 14, _SLOW, _LAST_MIX, decay=0.3),
    Stage("talk finely at 448", "language", 448, 270, 14, _FINE, _FINE_MIX, 0.02, 0.3, 10),
    Stage("talk more finely", "language", 448, 450, 14, _FINE, _WEAK_MIX, 0.02, 0.3, 10),
    Stage("talk finely of pairs", "language", 448, 270, 14, _LAST, _PAIR_MIX, 0.02, 0.3, 10),
    Stage("talk more of pairs", "language", 448, 270, 14, _LAST, _MOST_PAIRS, 0.02, 0.3, 10),
)


def learning_rate(stage: Stage, step: int) -> float:
    """Share of the peak rates: linear warm-up, then a half cosine down to `final`."""
    warmup = min(1.0, (step + 1) / stage.warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return warmup * (stage.final + (1 - stage.final) * falling)
