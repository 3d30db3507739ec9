"""Find the constants of `calibration.CALIBRATED` again, on the rows that are not held out.

    python -m build.planner.fit

Least squares of log(predicted / published) by coordinate search: every constant in turn goes up
or down by a step while that helps; when nothing helps, the steps are halved.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

from build.planner.calibration import Calibration
from build.planner.published import PublishedRow, predicted_tokens_per_s, published_rows

__all__ = ["fit", "loss"]

# Where the search begins; other beginnings end at the same constants.
START = {
    "matmul ampere bf16": 0.6,
    "matmul hopper bf16": 0.6,
    "matmul hopper fp8": 0.6,
    "matmul ada fp8": 0.6,
    "bandwidth": 0.8,
    "link nvlink": 0.5,
    "link pcie": 0.5,
    "all_reduce_s": 30e-6,
    "sequence_s": 5e-6,
}
FIRST_STEP = 0.2  # relative
LAST_STEP = 0.002
LARGEST_FRACTION = 1.0


def calibration_of(values: dict[str, float]) -> Calibration:
    def group(name: str) -> dict[str, float]:
        return {key.split(" ", 1)[1]: v for key, v in values.items() if key.startswith(f"{name} ")}

    return Calibration(
        matmul=group("matmul"),
        bandwidth=values["bandwidth"],
        link=group("link"),
        all_reduce_s=values["all_reduce_s"],
        sequence_s=values["sequence_s"],
    )


def loss(rows: Sequence[PublishedRow], calibration: Calibration) -> float:
    """Mean of log(predicted / published) squared."""
    ratios = (predicted_tokens_per_s(row, calibration) / row.output_tokens_per_s for row in rows)
    return sum(math.log(ratio) ** 2 for ratio in ratios) / len(rows)


def fit(rows: Sequence[PublishedRow]) -> dict[str, float]:
    """The constants with the least loss, to two significant digits."""
    values = _searched(START, lambda tried: loss(rows, calibration_of(tried)))
    return {name: float(f"{value:.2g}") for name, value in values.items()}


def _searched(
    start: dict[str, float], value_of: Callable[[dict[str, float]], float]
) -> dict[str, float]:
    best, least, step = dict(start), value_of(start), FIRST_STEP
    while step > LAST_STEP:
        helped = False
        for name in best:
            for factor in (1 + step, 1 / (1 + step)):
                tried = best | {name: best[name] * factor}
                if not name.endswith("_s") and tried[name] > LARGEST_FRACTION:
                    continue
                value = value_of(tried)
                if value < least:
                    best, least, helped = tried, value, True
        if not helped:
            step /= 2
    return best


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build.planner.fit", description="Fit the planner's constants again."
    )
    parser.parse_args(argv)
    for name, value in fit([row for row in published_rows() if not row.is_held_out]).items():
        print(f"{name:20} {value:g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
