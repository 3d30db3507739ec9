"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.tokenizer import Tokenizer, load_tokenizer

FAMILIES = ("qwen2", "internlm2")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a small random checkpoint with the 300M style tower, and its tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write_random_checkpoint(root / family, tiny_config(family, "300m"))
        for family in FAMILIES
    }


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], family: str) -> Path:
    return checkpoints[family]


@pytest.fixture
def spec(checkpoint: Path) -> ModelSpec:
    return ModelSpec.from_checkpoint(checkpoint)


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(checkpoint)
