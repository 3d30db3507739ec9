"""How programs end: exit codes and what stands on stderr."""

from __future__ import annotations

import pytest

from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program


@program(interrupted="interrupted; finished steps are kept")
def main(argv: list[str] | None = None) -> int:
    """A program."""
    if argv == ["wrong"]:
        raise InvalidRequest("three is not allowed; give 1 or 2")
    if argv == ["ctrl-c"]:
        raise KeyboardInterrupt
    if argv == ["bug"]:
        raise RuntimeError("a bug")
    return 3 if argv is None else len(argv)


@pytest.mark.parametrize(
    ("argv", "code", "stderr"),
    [
        (None, 3, ""),
        ([], 0, ""),
        (["wrong"], 1, "error: three is not allowed; give 1 or 2\n"),
        (["ctrl-c"], 130, "\ninterrupted; finished steps are kept\n"),
    ],
)
def test_exit_codes(
    argv: list[str] | None, code: int, stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    assert capsys.readouterr().err == stderr


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError):
        main(["bug"])


def test_the_name_is_kept() -> None:
    assert (main.__name__, main.__doc__) == ("main", "A program.")
