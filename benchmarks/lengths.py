"""Distributions of prompt and answer lengths, written as text: 64, 32-128, normal:64:16."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from internvl_triton.errors import InvalidRequest

__all__ = ["Lengths"]

_FORM = re.compile(
    r"(?P<low>\d+)(-(?P<high>\d+))?|normal:(?P<mean>\d+(\.\d+)?):(?P<std>\d+(\.\d+)?)", re.ASCII
)
_LONGEST = 1_000_000  # more than any model reads


@dataclass(frozen=True)
class Lengths:
    """N: always N. A-B: uniform, both ends included. normal:MEAN:STD: rounded, at least 1."""

    text: str

    def __post_init__(self) -> None:
        """Raises InvalidRequest for another form, or for numbers below 1 or above a million."""
        if not _FORM.fullmatch(self.text):
            raise InvalidRequest(
                f"{self.text!r} is no distribution of lengths; give 64, 32-128 or normal:64:16"
            )
        kind, first, second = self._parsed()
        highest = second if kind == "uniform" else max(first, second)
        if first < 1 or highest > _LONGEST or (kind == "uniform" and second < first):
            raise InvalidRequest(
                f"{self.text!r} is no distribution of lengths from 1 to {_LONGEST}, the smaller "
                "one first; give 64, 32-128 or normal:64:16"
            )

    def draw(self, random: np.random.Generator) -> int:
        kind, first, second = self._parsed()
        if kind == "normal":
            return max(1, round(random.normal(first, second)))
        return int(random.integers(int(first), int(second) + 1))

    def _parsed(self) -> tuple[str, float, float]:
        found = _FORM.fullmatch(self.text)
        assert found, self.text
        if found["mean"]:
            return "normal", float(found["mean"]), float(found["std"])
        return "uniform", float(found["low"]), float(found["high"] or found["low"])
