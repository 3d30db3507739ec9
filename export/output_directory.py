"""A directory of artefacts that appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_triton.errors import BuildFailed

__all__ = ["check_disk", "output_directory"]


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise BuildFailed unless the disk of `path`, which need not exist, has room for it."""
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise BuildFailed(
            f"{path} needs {needed_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free"
        )


@contextmanager
def output_directory(path: Path, *, holds: str) -> Iterator[Path]:
    """Yield a new directory beside `path` that takes its place when the block succeeds.

    A block that raises, or a killed process, leaves nothing under `path`; what a killed one left
    beside it is removed by the next run. An older `path` is replaced only if every file in it
    matches the regular expression `holds`, so that a mistyped path never costs somebody's files.

    Raises BuildFailed when `path` is a file or holds something else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise BuildFailed(f"{path} is a file; give a directory to write to")
    if path.is_dir():
        foreign = sorted(
            entry.name for entry in path.iterdir() if not re.fullmatch(holds, entry.name)
        )
        if foreign:
            raise BuildFailed(
                f"{path} holds {foreign[0]!r}, which this step did not write; "
                "give an empty or a new directory"
            )
    unfinished = path.with_name(path.name + ".tmp")
    previous = path.with_name(path.name + ".old")
    for leftover in (unfinished, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.is_dir():
            os.rename(path, previous)
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
