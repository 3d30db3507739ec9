"""Both vision towers and all seven projectors at their true widths, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.check_engines import check_engine
from build.parity.port import Port
from export import export_vision
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.vision_engine import OnnxVisionEngine
from tests.family.sizes import sizes

pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: see `make test-env`")

pytestmark = pytest.mark.timeout(3600)

MAX_RELATIVE_ERROR = 1e-4
# Weights of one layer and of what is outside the layers, by hand:
# 4 h^2 + 2 h m matrices, and the tower's style of biases, norms and scales.
LAYER = {
    1024: 4 * 1024**2 + 2 * 1024 * 4096 + (3 + 1 + 1 + 4 + 2) * 1024 + 4096,  # + 2 norms' biases
    3200: 4 * 3200**2 + 2 * 3200 * 12800 + (1 + 1 + 2 + 2 + 2) * 3200 + 12800,  # + q and k norms
}


def checkpoint_of(folder: Path, name: str, layers: int) -> Path:
    """The language model is a hole in a sparse file."""
    config = published_config(name, vision_layers=layers, llm_layers=1)
    return write_random_checkpoint(
        folder / "checkpoint", config, zeros="language_model.", tokenizer=False
    )


@pytest.mark.parametrize("name", sizes("InternVL2_5-1B"))
def test_two_layers_of_true_width_in_onnx_runtime(name: str, scratch: Path) -> None:
    vision, llm = PUBLISHED_MODELS[name]
    checkpoint = checkpoint_of(scratch, name, layers=2)
    path = export_vision(checkpoint, scratch / "vision", progress=False)
    width, hidden = vision["hidden_size"], llm["hidden_size"]
    outside = width * (1 + 3 * 14 * 14 + 1 + 1025)  # class token, patches, their bias, positions
    projector = 2 * 4 * width + (4 * width + 1) * hidden + (hidden + 1) * hidden
    weights = 2 * LAYER[width] + outside + projector
    stored = path.with_name(path.name + ".data").stat().st_size
    assert 0 <= stored - 2 * weights < 2**20  # bf16; the rest is alignment and constants

    engine = OnnxVisionEngine(path)
    assert (engine.hidden_size, engine.tokens_per_tile) == (hidden, 256)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3), np.uint8)
    found = engine.encode(tiles)
    expected = Port(checkpoint, streamed=True).visual_features(tiles)
    assert found.shape == expected.shape == (256, hidden)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < MAX_RELATIVE_ERROR


@pytest.mark.family
@pytest.mark.parametrize("name", PUBLISHED_MODELS, ids=[name[12:] for name in PUBLISHED_MODELS])
def test_tensorrt_compiles_it(name: str, scratch: Path) -> None:
    """InternViT-300M with all its 24 layers, InternViT-6B with 2 of 45."""
    layers = 24 if PUBLISHED_MODELS[name][0]["hidden_size"] == 1024 else 2
    checkpoint = checkpoint_of(scratch, name, layers)
    path = export_vision(checkpoint, scratch / "vision", progress=False)
    report = check_engine(path, compute_capabilities=("SM80", "SM89"), max_tiles=13, progress=False)
    assert report.compute_capabilities == ("SM80", "SM89")
    assert report.num_layers > 40 * layers
    assert report.engine_bytes > 0.9 * report.weight_bytes
