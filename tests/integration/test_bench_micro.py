"""The CPU engines beside PyTorch: both sides compute the same before they are timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine_time import llm_rows, vision_rows
from build.engines import build_engines
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint


def test_both_language_models_give_the_same_answers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="not installed: see `make test-env`")
    from build import Port

    checkpoint = write_random_checkpoint(
        tmp_path / "tiny", tiny_config("qwen2", "300m", llm_layers=1)
    )
    artifacts = build_engines(
        str(checkpoint), profile="cpu", artifacts_dir=tmp_path / "artifacts", progress=False
    )
    port = Port(checkpoint)
    _, alone, together = llm_rows(artifacts, port, prompt_tokens=12, tokens=5, rounds=1)
    assert (alone[0], alone[-1]) == ("1", "1 of 1")
    assert (together[0], together[-1]) == ("8", "8 of 8")
    for row in vision_rows(artifacts, port, tile_counts=(1, 2), rounds=1)[1:]:
        assert float(row[-1]) < 1e-3
    assert float(alone[1]) > 0
