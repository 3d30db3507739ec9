"""The demo's checkpoint: small, random, deterministic. Its answers mean nothing, on purpose.

It has the true structure (448-pixel tiles, 256 tokens a tile, thumbnail, ChatML prompt), so it
proves every step; what it says is compared with transformers, not read.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

__all__ = ["DEMO", "DEMO_NAMES", "demo_checkpoint", "demo_spec"]

DEMO = "demo"
DEMO_NAMES = (DEMO,)
_SEED = 12
_CONFIG = tiny_config("qwen2", "300m", llm_layers=4, vision_layers=3, vocab_size=1283)
_DONE = ".complete"


def demo_checkpoint(name: str, directory: Path) -> Path:
    """Write the checkpoint called `name` unless it is there already; return `directory`."""
    if (directory / _DONE).is_file():
        return directory
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    write_random_checkpoint(temporary, _CONFIG, seed=_SEED)
    (temporary / _DONE).touch()
    os.replace(temporary, directory)
    return directory


def demo_spec(name: str) -> ModelSpec:
    """Facts of the checkpoint called `name`, from its config alone."""
    return ModelSpec.from_config(_CONFIG)
