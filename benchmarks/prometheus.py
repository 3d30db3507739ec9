"""Reads a Prometheus text page: counters before and after a run, and their difference."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from internvl_triton.errors import ServerUnavailable

__all__ = ["Samples", "parse_samples", "read_samples"]

Labels = frozenset[tuple[str, str]]
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Samples:
    values: Mapping[tuple[str, Labels], float]

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples of this name that have these labels; 0 without one."""
        wanted = set(labels.items())
        return sum(v for (n, given), v in self.values.items() if n == name and wanted <= given)

    def has(self, name: str, **labels: str) -> bool:
        wanted = set(labels.items())
        return any(n == name and wanted <= given for n, given in self.values)

    def since(self, before: Samples) -> Samples:
        """What was added to each sample."""
        return Samples({k: v - before.values.get(k, 0.0) for k, v in self.values.items()})


def parse_samples(text: str) -> Samples:
    """The exposition format; comments and time stamps are left out."""
    values: dict[tuple[str, Labels], float] = {}
    for line in text.splitlines():
        if line.startswith("#") or not (found := _LINE.match(line)):
            continue
        name, labels, value = found.groups()
        values[name, frozenset(_LABEL.findall(labels or ""))] = float(value)
    return Samples(values)


def read_samples(url: str) -> Samples:
    """Raises ServerUnavailable when the page cannot be read."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return parse_samples(page.read().decode())
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ServerUnavailable(f"the metrics at {url} cannot be read: {error}") from error
