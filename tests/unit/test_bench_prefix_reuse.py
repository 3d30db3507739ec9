"""The table of the second turn against the first."""

import pytest

from benchmarks.prefix_reuse import KINDS, Kind, main, report


def test_report_by_hand() -> None:
    first, second, control = KINDS
    text = report(
        {
            first: Kind([0.4, 0.2, 0.3], [100, 100, 100], [90, 90, 90], [5, 5, 5]),
            second: Kind([0.06, 0.05, 0.07], [150, 150, 150], [20, 22, 24], [0, 0, 0]),
            control: Kind([0.3, 0.31, 0.29], [150, 150, 150], [140, 140, 140], [5, 5, 5]),
        }
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:5]]
    assert rows == [
        [first, "300 ms", "100", "90", "5"],
        [second, "60 ms", "150", "22", "0"],
        [control, "300 ms", "150", "140", "5"],
    ]
    assert "20% of the time of turn 1" in text  # 0.06 / 0.3
    assert "20% of its own time without reuse" in text


def test_without_metrics_only_times_are_told() -> None:
    text = report({name: Kind([0.1], [100]) for name in KINDS})
    assert "| - |" in " ".join(text.split())


@pytest.mark.parametrize("arguments", [["--dialogues=0"], ["--tiles=2"], ["--tiles=14"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--tiles is 1, or 3 to 13" in capsys.readouterr().err
