"""The plots of a load run, as SVG text for a page without other files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["curve", "distributions", "stacked_bars"]

_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#cb912f", "#787774", "#5b97bd",
            "#b15e50")  # fmt: skip


def curve(
    x: Sequence[float],
    lines: dict[str, Sequence[float]],
    *,
    marks: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """One line per name through the load points, each point marked with its load."""

    def draw(axes: Any) -> None:
        for number, (name, y) in enumerate(lines.items()):
            axes.plot(x, y, marker="o", label=name, color=_COLOURS[number])
        highest = list(lines.values())[-1]
        for position, height, mark in zip(x, highest, marks, strict=True):
            axes.annotate(mark, (position, height), (5, 5), textcoords="offset points", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.15 * max(x) or 1)  # room for the last mark
        axes.legend(frameon=False)

    return _svg(draw, title, x_label, y_label)


def distributions(values: dict[str, Sequence[float]], *, title: str, x_label: str) -> str:
    """The share of values up to x, a step line per name; x is logarithmic."""

    def draw(axes: Any) -> None:
        for number, (name, sample) in enumerate(values.items()):
            ordered = np.sort(np.maximum(sample, 1e-3))
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.step(ordered, share, where="post", label=name, color=colour)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        for level in (0.5, 0.9, 0.99):
            axes.axhline(level, color="#cccccc", linewidth=0.6, zorder=0)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, title, x_label, "share of values")


def stacked_bars(bars: dict[str, dict[str, float]], *, title: str, x_label: str) -> str:
    """One horizontal bar per name, made of named parts; parts below 0 are drawn as 0."""

    def draw(axes: Any) -> None:
        names = list(bars)[::-1]
        left = np.zeros(len(names))
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        for number, part in enumerate(parts):
            widths = np.array([max(0.0, bars[name].get(part, 0.0)) for name in names])
            colour = "#e3e2e0" if part == "unaccounted" else _COLOURS[number % len(_COLOURS)]
            axes.barh(names, widths, left=left, label=part, color=colour, height=0.6)
            left += widths
        axes.legend(frameon=False, fontsize=8, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.2))

    return _svg(draw, title, x_label, "", height=1.9 + 0.45 * len(bars))


def _svg(
    draw: Callable[[Any], None], title: str, x_label: str, y_label: str, *, height: float = 3.6
) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, height))
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
