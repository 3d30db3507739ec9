"""Draw the training's log as a small picture: losses and exact answers over time.

python -m demo.curve
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_curve", "main"]

_WIDTH, _PANEL, _MARGIN, _GAP = 760, 190, 56, 34
_LOSS = {"loss": ("loss of the answers", (190, 40, 40)), "dense": ("dense loss", (150, 150, 150))}
_SHARES = {
    "exact": ("exact answers", (20, 110, 40)),
    "digit": ("dense: digits", (60, 90, 200)),
    "kind": ("dense: shapes", (220, 130, 30)),
}


def draw_curve(log: Path, picture: Path) -> None:
    """log: JSON lines as the training writes them. picture: a PNG file."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    hours = _elapsed_hours(lines)
    image = Image.new("RGB", (_WIDTH, 2 * _PANEL + 3 * _GAP), "white")
    draw = ImageDraw.Draw(image)
    stages = _stage_starts(lines, hours)
    low, high = math.log10(0.003), math.log10(10)
    _panel(
        draw, _GAP, lines, hours, stages, _LOSS,
        scale=lambda value: (math.log10(max(value, 1e-9)) - low) / (high - low),
        ticks=(0.01, 0.1, 1.0, 10.0),
    )  # fmt: skip
    _panel(
        draw, 2 * _GAP + _PANEL, lines, hours, stages, _SHARES,
        scale=lambda value: value, ticks=(0.0, 0.5, 0.9, 1.0),
    )  # fmt: skip
    draw.text((_WIDTH - 130, 2 * (_GAP + _PANEL) + 16), "hours of training", "black", _font(11))
    image.save(picture)


def _elapsed_hours(lines: list[dict[str, Any]]) -> list[float]:
    return [line["seconds"] / 3600 for line in lines]


def _stage_starts(lines: list[dict[str, Any]], hours: list[float]) -> dict[str, float]:
    starts: dict[str, float] = {}
    for line, hour in zip(lines, hours, strict=True):
        starts.setdefault(line["stage"], hour)
    return starts


def _panel(
    draw: ImageDraw.ImageDraw,
    top: int,
    lines: list[dict[str, Any]],
    hours: list[float],
    stages: dict[str, float],
    series: dict[str, tuple[str, tuple[int, int, int]]],
    *,
    scale: Any,
    ticks: tuple[float, ...],
) -> None:
    width = _WIDTH - _MARGIN - 12
    end = max(hours) or 1.0

    def place(hour: float, value: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, scale(value)))
        return _MARGIN + hour / end * width, top + (1 - share) * _PANEL

    for tick in ticks:
        _, y = place(0, tick)
        draw.line((_MARGIN, y, _MARGIN + width, y), (225, 225, 225))
        draw.text((8, y - 7), f"{tick:g}", (90, 90, 90), _font(11))
    for name, hour in stages.items():
        x, _ = place(hour, ticks[0])
        draw.line((x, top, x, top + _PANEL), (190, 190, 190))
        draw.text((x + 3, top - 14), name, (90, 90, 90), _font(11))
    for row, (key, (title, color)) in enumerate(series.items()):
        points = [place(h, line[key]) for line, h in zip(lines, hours, strict=True) if key in line]
        if len(points) > 1:
            draw.line(points, color, 2)
        draw.text((_MARGIN + 8, top + _PANEL - 18 - 15 * row), title, color, _font(12))
    draw.text((_MARGIN, top + _PANEL + 2), "0", (90, 90, 90), _font(11))
    draw.text((_MARGIN + width - 20, top + _PANEL + 2), f"{end:.1f}", (90, 90, 90), _font(11))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    training = Path("artifacts/demo-training")
    parser.add_argument("--log", type=Path, default=training / "log.jsonl")
    parser.add_argument("--picture", type=Path, default=training / "curve.png")
    arguments = parser.parse_args()
    draw_curve(arguments.log, arguments.picture)
    print(arguments.picture)  # noqa: T201


if __name__ == "__main__":
    main()
