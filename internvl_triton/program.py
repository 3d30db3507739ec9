"""How the project's programs end when something is wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Protocol

from internvl_triton.errors import InternVLTritonError

__all__ = ["program"]


class _Main(Protocol):
    def __call__(self, argv: list[str] | None = None) -> int: ...


def program(*, interrupted: str = "interrupted") -> Callable[[Callable[..., int]], _Main]:
    """For a program's `main`, which takes the arguments and returns the exit code.

    An InternVLTritonError becomes one line on stderr and exit code 1, Ctrl-C the line `interrupted`
    and 130.
    """

    def decorate(main: Callable[..., int]) -> _Main:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except InternVLTritonError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"\n{interrupted}", file=sys.stderr)
                return 130

        return run

    return decorate
