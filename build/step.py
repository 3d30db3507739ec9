"""One step of `make engines`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """Up to date while the manifest has this key and `output` exists.

    made_with: goes into the manifest, for the checks at server start.
    """

    name: str
    key: str
    output: Path
    run: Callable[[], object]
    made_with: dict[str, str] = field(default_factory=dict)
