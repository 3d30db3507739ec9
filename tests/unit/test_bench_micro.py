"""The micro-benchmarks: turns and ratios by hand, and each table once on something small."""

from __future__ import annotations

import pytest

from benchmarks.pictures import jpeg
from benchmarks.side_by_side import ratio_row, time_in_turn


def test_alternatives_take_turns() -> None:
    calls: list[str] = []
    seconds = time_in_turn(
        {name: lambda name=name: calls.append(name) for name in "abc"},  # type: ignore[misc]
        rounds=20,
    )
    assert calls[:3] == ["a", "b", "c"]  # not counted
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 20)


def test_ratio_row() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 12.0]}
    assert ratio_row(seconds) == ["2000.00", "3000.00", "2.00 (1.50-3.00)"]
    assert ratio_row(seconds, scale=1 / 4)[:2] == ["500.00", "750.00"]


def test_boundary_bytes_of_a_picture() -> None:
    from benchmarks.preprocessing_time import boundary_rows

    head, row = boundary_rows([(896, 448)], hidden_size=1000)
    cells = dict(zip(head, row, strict=True))
    assert cells["picture"] == "896x448"
    assert cells["file MB"] == f"{len(jpeg(896, 448, 0)) / 1e6:.2f}"
    assert cells["tiles uint8 MB"] == "1.81"  # 3 * 448 * 448 * 3
    assert cells["as float32 MB"] == "7.23"
    assert cells["visual tokens"] == "768"  # 3 * 256
    assert (cells["features float32 MB"], cells["bfloat16 MB"]) == ("3.07", "1.54")


def test_all_three_preprocessors_give_the_same_pixels() -> None:
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from benchmarks.preprocessing_time import largest_difference, time_rows

    found = largest_difference(jpeg(500, 250, 0))  # three tiles
    assert found["model card"] < 1e-3
    assert found["transformers"] <= 1.001  # its resize may round a pixel the other way
    head, row = time_rows([(300, 300)], at_a_time=2, threads=2, rounds=1)
    assert len(head) == len(row) == 7
    assert row[:2] == ["300x300", "1"]
