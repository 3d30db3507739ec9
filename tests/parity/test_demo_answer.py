"""The answer that `make demo` expects is the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build.demo_checkpoint import DEMO, demo_checkpoint

pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")


def test_the_expected_answer_is_the_references(tmp_path: Path) -> None:
    from tests.demo_reference import SAMPLES, demo_reference

    expected = json.loads((SAMPLES / "shapes.json").read_text())
    found, margin = demo_reference(demo_checkpoint(DEMO, tmp_path / "demo"))
    assert found["token_ids"] == expected["token_ids"]
    assert margin > 0.05  # no near tie that rounding could turn
