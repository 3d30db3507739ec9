"""The sizes that take minutes and tens of GB of disk run when they are asked for.

`make check-family` runs everything here; elsewhere only one small representative of each kind.
"""

from __future__ import annotations

import pytest


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
