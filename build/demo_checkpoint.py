"""The demo's checkpoint: small, random, deterministic. Its answers mean nothing, on purpose.

It has the true structure (448-pixel tiles, 256 tokens a tile, thumbnail, ChatML prompt), so it
proves every step; what it says is compared with transformers, not read.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

__all__ = ["DEMO_CONFIG", "ensure_demo_checkpoint"]

DEMO_SEED = 12
DEMO_CONFIG = tiny_config("qwen2", "300m", llm_layers=4, vision_layers=3, vocab_size=1283)
_DONE = ".complete"


def ensure_demo_checkpoint(directory: Path) -> Path:
    """Write the checkpoint unless it is there already; return `directory`."""
    if (directory / _DONE).is_file():
        return directory
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    write_random_checkpoint(temporary, DEMO_CONFIG, seed=DEMO_SEED)
    (temporary / _DONE).touch()
    os.replace(temporary, directory)
    return directory
