"""The sizes that take minutes and GB of disk run when they are asked for.

`make check-family` runs everything here, `make check-family OPTIONS="-k 26B"` one size; elsewhere
only one small representative of each kind runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone when the test ends, however it ends: one size can fill 26 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "family" in config.option.markexpr:
        return
    heavy = [
        item
        for item in items
        if "tests/family/" in item.nodeid and item.get_closest_marker("family")
    ]
    config.hook.pytest_deselected(items=heavy)
    items[:] = [item for item in items if item not in heavy]
