"""Published numbers beside predictions, as data: what `python -m build.plan --validate` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from build.planner.calibration import CALIBRATED, Calibration
from build.planner.other_published import Comparison, first_tokens, served_internvl
from build.planner.published import (
    error,
    median_error,
    predicted_tokens_per_s,
    published_rows,
    published_source,
)

__all__ = ["validation"]

Section = list[dict[str, Any]]


def validation() -> dict[str, Any]:
    """Every published row beside the prediction, and the constants in use."""
    rows = published_rows()
    held_out = [row for row in rows if row.is_held_out]
    fitted = [row for row in rows if not row.is_held_out]
    return {
        "source": published_source(),
        "rows": [
            {
                "model": row.model,
                "TP": row.tp_size,
                "column": row.column,
                "in, out": f"{row.input_tokens}, {row.output_tokens}",
                "published_tokens_per_s": row.output_tokens_per_s,
                "predicted_tokens_per_s": predicted_tokens_per_s(row),
                "ratio": predicted_tokens_per_s(row) / row.output_tokens_per_s,
                "held out": "yes" if row.is_held_out else "",
            }
            for row in rows
        ],
        "first tokens, none fitted": _comparisons(first_tokens()),
        "InternVL2.5 as a service, none fitted": _comparisons(served_internvl()),
        "calibration": _calibration(CALIBRATED),
        "errors": [
            {
                "rows": name,
                "number": len(chosen),
                "median error_share": median_error(chosen),
                "largest error_share": max(map(error, chosen)),
            }
            for name, chosen in (("held out", held_out), ("fitted", fitted))
        ],
    }


def _comparisons(comparisons: Iterable[Comparison]) -> Section:
    return [
        {
            "what": each.what,
            "published": each.published,
            "predicted": each.predicted,
            "ratio": each.predicted / each.published,
        }
        for each in comparisons
    ]


def _calibration(calibration: Calibration) -> Section:
    rows: Section = [
        {"constant": f"share of the {kind} peak", "value": fraction}
        for kind, fraction in calibration.matmul.items()
    ]
    rows.append({"constant": "share of the memory bandwidth", "value": calibration.bandwidth})
    rows += [
        {"constant": f"share of the {kind} bandwidth", "value": fraction}
        for kind, fraction in calibration.link.items()
    ]
    rows.append({"constant": "s per all-reduce", "value": calibration.all_reduce_s})
    rows.append({"constant": "s per sequence and step", "value": calibration.sequence_s})
    return rows
