"""A load run as CSV, as Markdown, and as one HTML page with plots that needs no other file."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.environment import DISTURBED
from benchmarks.load_run import LoadPoint, LoadRun
from benchmarks.markdown import markdown_table
from benchmarks.metrics import defined, gaps_s, ttft_s
from benchmarks.stages import WITHIN

__all__ = ["csv_text", "html_text", "markdown_text", "run_warnings", "write_report"]

Rows = list[list[str]]

# header -> name in the summary, decimals
_MAIN = {
    "requests/s": ("requests_per_s", 2),
    "output tokens/s": ("output_tokens_per_s", 1),
    "total tokens/s": ("total_tokens_per_s", 0),
    "images/s": ("images_per_s", 2),
    "tiles/s": ("tiles_per_s", 2),
    "goodput/s": ("goodput_per_s", 2),
    "requests": ("requests", 0),
    "failed": ("failed", 0),
}
_TIMES = {"TTFT": "ttft", "ITL": "itl", "TPOT": "tpot", "latency": "latency"}
_PARTS = ("mean", "p50", "p90", "p99")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e2e0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .facts td { text-align: left; vertical-align: top; }
svg { max-width: 100%; height: auto; } .bad { color: #b3261e; }
"""


def write_report(run: LoadRun, folder: Path) -> Path:
    """run.json, points.csv, report.md and report.html. The path of the page."""
    run.write(folder)
    (folder / "points.csv").write_text(csv_text(run), encoding="utf-8")
    (folder / "report.md").write_text(markdown_text(run), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(html_text(run), encoding="utf-8")
    return page


def csv_text(run: LoadRun) -> str:
    """One line per load point; an empty cell where a metric is not defined. Stages in ms."""
    stages = list(dict.fromkeys(name for point in run.points for name in point.stages))
    names = list(run.points[0].summary)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["load", *names, *(f"stage {name} ms" for name in stages)])
    for point in run.points:
        cells = [point.summary[name] for name in names]
        cells += [1000 * point.stages[name] if name in point.stages else None for name in stages]
        writer.writerow([point.load, *("" if cell is None else f"{cell:.6g}" for cell in cells)])
    return file.getvalue()


def markdown_text(run: LoadRun) -> str:
    parts = [f"# {run.title}"]
    for title, rows in _tables(run):
        parts.append(f"## {title}\n\n{markdown_table(rows)}")
    parts += [f"**{_warning(text)}**" for text in run_warnings(run)]
    facts = [f"- {name}: {text}" for name, text in {**run.settings, **run.environment}.items()]
    return "\n\n".join([*parts, "\n".join(facts)]) + "\n"


def html_text(run: LoadRun) -> str:
    parts = [f"<h1>{html.escape(run.title)}</h1>"]
    parts += [f'<p class="bad">{html.escape(_warning(text))}</p>' for text in run_warnings(run)]
    parts += _plots(run)
    for title, rows in _tables(run):
        parts.append(f"<h2>{html.escape(title)}</h2>{_html_table(rows)}")
    facts = [[name, text] for name, text in {**run.settings, **run.environment}.items()]
    parts.append(f"<h2>What ran where</h2>{_html_table([['', ''], *facts], kind='facts')}")
    body = "\n".join(parts)
    title = html.escape(run.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _tables(run: LoadRun) -> list[tuple[str, Rows]]:
    tables = [("Throughput", _main_table(run)), ("Times in ms", _times_table(run))]
    staged = [point for point in run.points if point.stages]
    if staged:
        title = "Where the time goes, mean ms per request, those of the warm-up and the ramp too"
        tables.append((title, _stage_table(staged)))
    errors = [
        [point.load, kind, str(count)]
        for point in run.points
        for kind, count in point.errors.items()
    ]
    if errors:
        tables.append(("Errors", [["load", "kind", "requests"], *errors]))
    gpus = [
        [f"{point.load}, GPU {index}", *(_number(use.get(name), 0) for name in _GPU)]
        for point in run.points
        for index, use in point.gpus.items()
    ]
    if gpus:
        tables.append(("GPU use, mean", [["", *_GPU.values()], *gpus]))
    if run.overhead:
        cells = [[name.replace("_", " "), f"{value:.3g}"] for name, value in run.overhead.items()]
        title = "The load generator's own cost, against a server that answers at once"
        tables.append((title, [["", "value"], *cells]))
    return tables


_MOST_LAG = 0.1  # of the TTFT
_GPU = {"utilisation_percent": "busy %", "memory_mib": "memory MiB", "power_w": "power W"}


def _main_table(run: LoadRun) -> Rows:
    rows = [["load", *_MAIN]]
    for point in run.points:
        cells = [_number(point.summary[name], decimals) for name, decimals in _MAIN.values()]
        rows.append([point.load, *cells])
    return rows


def _times_table(run: LoadRun) -> Rows:
    rows = [["load", *(f"{title} {part}" for title in _TIMES for part in _PARTS)]]
    for point in run.points:
        values = [point.summary[f"{name}_{part}_ms"] for name in _TIMES.values() for part in _PARTS]
        rows.append([point.load, *(_number(value, 1) for value in values)])
    return rows


def _stage_table(points: Sequence[LoadPoint]) -> Rows:
    names = list(dict.fromkeys(name for point in points for name in point.stages))
    rows = [["load", *names, "latency", "sum of stages / latency"]]
    for point in points:
        total = sum(point.stages.values())
        known = total - point.stages.get("unaccounted", 0.0)
        cells = [_number(1000 * point.stages[n] if n in point.stages else None, 2) for n in names]
        rows.append([point.load, *cells, _number(1000 * total, 2), f"{100 * known / total:.1f} %"])
    return rows


def _plots(run: LoadRun) -> list[str]:
    drawn = [point for point in run.points if point.summary["ttft_p50_ms"] is not None]
    if not drawn:
        return []
    rate, unit = "output_tokens_per_s", "output tokens/s"
    if any(point.summary[rate] is None for point in drawn):
        rate, unit = "requests_per_s", "requests/s"
    throughput = [point.summary[rate] or 0.0 for point in drawn]
    latencies: dict[str, Sequence[float]] = {
        f"latency {part}": [(point.summary[f"latency_{part}_ms"] or 0.0) / 1000 for point in drawn]
        for part in ("p50", "p99")
    }
    figures = [
        plots.curve(
            throughput,
            latencies,
            marks=[point.load for point in drawn],
            title="Latency and throughput",
            x_label=unit,
            y_label="latency, s",
        ),
        plots.distributions(
            {p.load: [1000 * v for v in defined(ttft_s, p.measured)] for p in drawn},
            title="Time to the first text (TTFT)",
            x_label="ms",
        ),
    ]
    gaps = {p.load: [1000 * v for v in gaps_s(p.measured)] for p in drawn}
    gaps = {load: values for load, values in gaps.items() if values}
    if gaps:
        title = "Gaps between chunks with text (ITL)"
        figures.append(plots.distributions(gaps, title=title, x_label="ms"))
    stages = {p.load: {n: 1000 * s for n, s in p.stages.items()} for p in run.points if p.stages}
    if stages:
        title = "Where the time goes"
        label = "mean ms per request"
        figures.append(plots.stacked_bars(stages, title=title, x_label=label))
    busy = {
        p.load: {f"GPU {i}": use.get("utilisation_percent", 0.0) for i, use in p.gpus.items()}
        for p in run.points
        if p.gpus
    }
    if busy:
        title = "GPU use, added up"
        figures.append(plots.stacked_bars(busy, title=title, x_label="busy, %"))
    return figures


def run_warnings(run: LoadRun) -> list[str]:
    """What makes the numbers doubtful."""
    found = [f"{DISTURBED} {run.environment[DISTURBED]}"] if DISTURBED in run.environment else []
    for point in run.points:
        requests, failed = point.summary["requests"] or 0, point.summary["failed"] or 0
        if failed:
            found.append(f"{point.load}: {failed:g} of {requests:g} requests failed")
        elif requests < 30:
            found.append(f"{point.load}: p99 of {requests:g} requests says little")
        if not point.counts_tokens:
            found.append(f"{point.load}: the endpoint does not count tokens, so no rate of them")
        silent = sum(not record.error and not record.chunks_s for record in point.measured)
        if silent:
            found.append(f"{point.load}: {silent} answers had no text")
        if point.no_stages:
            found.append(f"{point.load}: no stages, because {point.no_stages}")
        late = point.summary["lateness_p99_ms"]
        if late is not None and late > 20:
            found.append(f"{point.load}: requests were sent up to {late:.0f} ms late (p99)")
        if run.overhead and point.summary["output_tokens_per_s"]:
            most = run.overhead["max_tokens_per_s"]
            share = point.summary["output_tokens_per_s"] / most
            if share > 0.3:
                found.append(f"{point.load}: the generator was at {100 * share:.0f} % of its limit")
        ttft_ms = point.summary["ttft_p50_ms"]
        if ttft_ms is not None and point.generator_lag_ms > _MOST_LAG * ttft_ms:
            found.append(
                f"{point.load}: the generator itself was {point.generator_lag_ms:.0f} ms late "
                f"(p99) to note what came, beside a TTFT of {ttft_ms:.0f} ms (p50): let it run on "
                "another machine than the server, or take fewer users"
            )
        total = sum(point.stages.values())
        mean = (point.summary["latency_mean_ms"] or 0.0) / 1000
        if point.stages and abs(total - mean) > WITHIN * mean:
            found.append(
                f"{point.load}: the stages are those of all requests, {1000 * total:.0f} ms, and "
                f"the warm-up or the ramp took another time than the {1000 * mean:.0f} ms that "
                "were measured"
            )
        if point.stages and abs(point.stages.get("unaccounted", 0.0)) > WITHIN * total:
            found.append(f"{point.load}: the stages do not add up to the latency within 5 %")
    return found


def _warning(text: str) -> str:
    return f"Careful: {text}."


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def _html_table(rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"] if any(head) else []
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'
