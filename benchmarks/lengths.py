"""Distributions of prompt and answer lengths, written as text: 64, 32-128, normal:64:16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from internvl_triton.errors import InvalidRequest

__all__ = ["Lengths"]


@dataclass(frozen=True)
class Lengths:
    """N: always N. A-B: uniform, both ends included. normal:MEAN:STD: rounded, at least 1."""

    text: str

    def __post_init__(self) -> None:
        """Raises InvalidRequest for another form."""
        try:
            kind, low, high = self._parsed()
        except ValueError:
            kind, low, high = "", 0.0, 0.0
        if not kind or low < 1 or high < (low if kind == "uniform" else 0):
            raise InvalidRequest(
                f"{self.text!r} is no distribution of lengths; give 64, 32-128 or normal:64:16"
            )

    def draw(self, random: np.random.Generator) -> int:
        kind, first, second = self._parsed()
        if kind == "normal":
            return max(1, round(random.normal(first, second)))
        return int(random.integers(int(first), int(second) + 1))

    def _parsed(self) -> tuple[str, float, float]:
        if self.text.startswith("normal:"):
            _, mean, deviation = self.text.split(":")
            return "normal", float(mean), float(deviation)
        low, _, high = self.text.partition("-")
        return "uniform", int(low), int(high or low)
