"""Latency grids: the file of one run, and the report of several builds side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import DISTURBED
from benchmarks.markdown import markdown_table
from internvl_triton.errors import InvalidRequest

__all__ = ["GridPoint", "GridRun", "csv_text", "markdown_text", "read_runs", "write_report"]

_FORMAT = 1
Rows = list[list[str]]


@dataclass
class GridPoint:
    """`batch` requests at a time, each with `num_tiles` tiles.

    summary: see summary.py. floors: see `latency_grid.floors_of_point`; {} where there are none.
    input_tokens: median of the prompts, visual tokens included.
    """

    num_tiles: int
    batch: int
    input_tokens: int
    output_tokens: int
    summary: dict[str, float | None]
    floors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    gpus: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class GridRun:
    """One build's grid. build: such as "bf16-tp2"; floors: one sentence, which or why none."""

    model: str
    build: str
    profile: str
    floors: str
    settings: dict[str, str]
    environment: dict[str, str]
    points: list[GridPoint]
    format: int = _FORMAT

    def write(self, folder: Path) -> Path:
        """`<build>-<profile>.json` in `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.build}-{self.profile}.json"
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        return unfinished.replace(file)


def read_runs(folder: Path) -> list[GridRun]:
    """All runs in `folder`, the smallest TP first.

    Raises InvalidRequest: there are none, a file is none, or they cannot stand side by side.
    """
    runs = [_read(file) for file in sorted(folder.glob("*.json"))]
    if not runs:
        raise InvalidRequest(f"{folder} holds no run of `make bench-grid`")
    first = runs[0]
    for run in runs[1:]:
        if (run.model, run.settings) != (first.model, first.settings):
            raise InvalidRequest(
                f"{folder} holds runs of different kinds: {first.model} with {first.settings} and "
                f"{run.model} with {run.settings}; use another --output for each kind"
            )
    return sorted(runs, key=lambda run: (run.profile, _tp_size(run.build), run.build))


def write_report(folder: Path) -> str:
    """report.md and grid.csv of all runs in `folder`; the text of the report."""
    runs = read_runs(folder)
    text = markdown_text(runs)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "grid.csv").write_text(csv_text(runs), encoding="utf-8")
    return text


# title -> name in the summary, name in the floors, decimals
_TABLES = {
    "TTFT p50, ms": ("ttft_p50_ms", "ttft_ms", 1),
    "ms per output token (TPOT p50)": ("tpot_p50_ms", "tpot_ms", 2),
    "latency p50, ms": ("latency_p50_ms", "latency_ms", 1),
    "latency p99, ms": ("latency_p99_ms", "latency_ms", 1),
}
_THROUGHPUT = ("output tokens/s", "output_tokens_per_s")
_PARTS = ("vision_ms", "prefill_ms", "step_ms")


def markdown_text(runs: Sequence[GridRun]) -> str:
    """One table per metric; a row per tiles and batch, the builds from left to right."""
    first = runs[0]
    parts = [f"# {first.model}: latency by batch, tiles and TP"]
    parts.append("\n".join(f"- {name}: {text}" for name, text in first.settings.items()))
    for title, (name, floor, decimals) in _TABLES.items():
        rows = _table(runs, name, floor, decimals)
        parts.append(f"## {title}\n\n{markdown_table(rows)}")
    title, name = _THROUGHPUT
    rows = _table(runs, name, name, 1, at_most=True)
    parts.append(f"## {title}\n\n{markdown_table(rows)}")
    if any(point.floors for run in runs for point in run.points):
        parts.append(f"## Floors, ms\n\n{markdown_table(_floor_table(runs))}\n\n{_NOTE}")
    parts += [f"**Careful: {text}.**" for text in _warnings(runs)]
    for run in runs:
        facts = "\n".join(f"- {name}: {text}" for name, text in run.environment.items())
        parts.append(f"## {_title(run)}\n\n{run.floors}\n\n{facts}")
    return "\n\n".join(parts) + "\n"


_NOTE = (
    "From FLOPs, bytes and the data sheet, as `make plan`: a picture's tiles shared by the GPUs, "
    "its prompt with no other, and a decoding step of the whole batch. TTFT: vision + prefill. "
    "Latency: TTFT and a step for each further token. Waiting for other requests, preprocessing "
    "and the network are in what is measured, not in the floor; tokens/s: at most so many."
)


def csv_text(runs: Sequence[GridRun]) -> str:
    """One line per build and point; an empty cell where a value is not defined."""
    names = list(runs[0].points[0].summary)
    floors = list(dict.fromkeys(n for run in runs for point in run.points for n in point.floors))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ["build", "profile", "tiles", "batch", "input_tokens", "output_tokens"]
    writer.writerow([*columns, *names, *(f"floor {name}" for name in floors)])
    for run in runs:
        for point in run.points:
            cells = [point.summary.get(name) for name in names]
            cells += [point.floors.get(name) for name in floors]
            numbers = ["" if cell is None else f"{cell:.6g}" for cell in cells]
            place = [point.num_tiles, point.batch, point.input_tokens, point.output_tokens]
            writer.writerow([run.build, run.profile, *place, *numbers])
    return file.getvalue()


def _table(
    runs: Sequence[GridRun], name: str, floor: str, decimals: int, *, at_most: bool = False
) -> Rows:
    """Header, then a row per point of any run; "-" where a run has no such point or value."""
    head = [""]
    for run in runs:
        head.append(_title(run))
        if _has_floors(run):
            head += ["at most", "of it"] if at_most else ["floor", "/ floor"]
    rows = [head]
    for key in _places(runs):
        row = [_place(*key)]
        for run in runs:
            point = _point(run, key)
            value = point.summary.get(name) if point else None
            row.append("-" if value is None else f"{value:,.{decimals}f}")
            if not _has_floors(run):
                continue
            limit = point.floors.get(floor) if point else None
            if value is None or limit is None:
                row += ["-", "-"]
            else:
                ratio = f"{value / limit:.0%}" if at_most else f"{value / limit:.2f}"
                row += [f"{limit:,.{decimals}f}", ratio]
        rows.append(row)
    return rows


def _floor_table(runs: Sequence[GridRun]) -> Rows:
    with_floors = [run for run in runs if _has_floors(run)]
    names = [part.removesuffix("_ms") for part in _PARTS]
    rows = [["", *(f"{_title(run)} {name}" for run in with_floors for name in names)]]
    for key in _places(with_floors):
        cells = []
        for run in with_floors:
            point = _point(run, key)
            cells += [f"{point.floors[part]:,.2f}" if point else "-" for part in _PARTS]
        rows.append([_place(*key), *cells])
    return rows


def _warnings(runs: Sequence[GridRun]) -> list[str]:
    """What makes the numbers doubtful."""
    found = []
    for run in runs:
        if DISTURBED in run.environment:
            found.append(f"{_title(run)} was {DISTURBED} {run.environment[DISTURBED]}")
        for point in run.points:
            requests, failed = point.summary["requests"] or 0, point.summary["failed"] or 0
            where = f"{_title(run)}, {_place(point.num_tiles, point.batch)}"
            if failed:
                kinds = ", ".join(point.errors)
                found.append(f"{where}: {failed:g} of {requests:g} requests failed ({kinds})")
    few = min(point.summary["requests"] or 0 for run in runs for point in run.points)
    if few < 30:
        found.append(f"p99 of {few:g} requests, the fewest of a point, says little")
    return found


def _places(runs: Sequence[GridRun]) -> list[tuple[int, int]]:
    return sorted({(point.num_tiles, point.batch) for run in runs for point in run.points})


def _point(run: GridRun, key: tuple[int, int]) -> GridPoint | None:
    found = [point for point in run.points if (point.num_tiles, point.batch) == key]
    return found[0] if found else None


def _place(num_tiles: int, batch: int) -> str:
    tiles = f"{num_tiles} tile{'s' if num_tiles != 1 else ''}" if num_tiles else "text"
    return f"{tiles}, {batch} at a time"


def _has_floors(run: GridRun) -> bool:
    return any(point.floors for point in run.points)


def _title(run: GridRun) -> str:
    return f"{run.build} ({run.profile})"


def _tp_size(build: str) -> int:
    return int(build.rpartition("-tp")[2])


def _read(file: Path) -> GridRun:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise InvalidRequest(
                f"{file} has format {values['format']}; this release reads {_FORMAT}"
            )
        return GridRun(**{**values, "points": [GridPoint(**each) for each in values["points"]]})
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{file} was not written by `make bench-grid`") from error
