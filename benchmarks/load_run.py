"""A finished load run: what `make bench` writes and `make bench-compare` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import RequestRecord
from internvl_triton.errors import InvalidRequest

__all__ = ["LoadPoint", "LoadRun"]

_FILE = "run.json"
_FORMAT = 1


@dataclass
class LoadPoint:
    """One load. summary: see summary.py. stages: name -> mean s per request, with "unaccounted";
    of all requests, the warm-up too, because the server's counters know none. no_stages: why there
    are none although they were asked for. generator_lag_ms: p99 of how late the load generator
    came to what it had to do (`load.run_load`)."""

    load: str
    summary: dict[str, float | None]
    errors: dict[str, int]
    records: list[RequestRecord]
    stages: dict[str, float] = field(default_factory=dict)
    gpus: dict[str, dict[str, float]] = field(default_factory=dict)
    no_stages: str = ""
    generator_lag_ms: float = 0.0

    @property
    def measured(self) -> list[RequestRecord]:
        return [record for record in self.records if not record.warm_up]

    @property
    def counts_tokens(self) -> bool:
        """Whether the endpoint counted the tokens of everything that was measured."""
        return all(record.output_tokens is not None for record in self.measured)


@dataclass
class LoadRun:
    """title: what was measured, for people. settings: workload, SLO, target."""

    title: str
    settings: dict[str, str]
    environment: dict[str, str]
    points: list[LoadPoint]
    overhead: dict[str, float] | None = None
    format: int = _FORMAT

    def write(self, folder: Path) -> Path:
        """run.json in `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / (_FILE + ".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=1, allow_nan=False), encoding="utf-8")
        return unfinished.replace(folder / _FILE)

    @classmethod
    def read(cls, path: Path) -> LoadRun:
        """path: run.json or its folder. Raises InvalidRequest when it is no such file."""
        file = path / _FILE if path.is_dir() else path
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if values["format"] != _FORMAT:
                raise InvalidRequest(
                    f"{file} has format {values['format']}; this release reads {_FORMAT}"
                )
            points = [
                LoadPoint(**{**point, "records": [RequestRecord(**r) for r in point["records"]]})
                for point in values["points"]
            ]
            return cls(**{**values, "points": points})
        except OSError as error:
            raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{file} was not written by `make bench`") from error
