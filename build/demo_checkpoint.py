"""The demo's checkpoints by name: the one that is shipped, and the same model in the other layout.

`demo` is demo/checkpoint, a Qwen2 layout. `demo-internlm2` is made from it: the same weights under
the names and in the order of InternLM2, so that both families can be shown and compared.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from build.fingerprint import source_digest
from internvl_triton.model_spec import ModelSpec

__all__ = ["DEMO", "DEMO_INTERNLM2", "DEMO_NAMES", "SHIPPED", "demo_checkpoint", "demo_spec"]

DEMO = "demo"
DEMO_INTERNLM2 = "demo-internlm2"
DEMO_NAMES = (DEMO, DEMO_INTERNLM2)
_DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"
SHIPPED = _DEMO_FOLDER / "checkpoint"
_LAYOUT = _DEMO_FOLDER / "internlm2_layout.py"
_MADE_FROM = "made-from"


def demo_checkpoint(name: str, directory: Path) -> Path:
    """Where the checkpoint called `name` is.

    directory: where `demo-internlm2` is written, unless it is there already and was made from what
    is shipped now.
    """
    assert name in DEMO_NAMES
    if name == DEMO:
        return SHIPPED
    from demo import write_internlm2_layout

    source = source_digest([*SHIPPED.iterdir(), _LAYOUT])
    note = directory / _MADE_FROM
    if note.is_file() and note.read_text(encoding="utf-8") == source:
        return directory
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    write_internlm2_layout(SHIPPED, temporary)
    (temporary / _MADE_FROM).write_text(source, encoding="utf-8")
    os.replace(temporary, directory)
    return directory


def demo_spec(name: str) -> ModelSpec:
    """Facts of the checkpoint called `name`, from its config alone."""
    assert name in DEMO_NAMES
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    if name == DEMO_INTERNLM2:
        from demo import internlm2_config

        config = internlm2_config(config)
    return ModelSpec.from_config(config)
