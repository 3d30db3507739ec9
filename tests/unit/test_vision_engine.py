"""The CPU profile's vision engine: runs of bounded size, and clear refusals."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest

from export import export_vision
from internvl_triton.errors import ArtifactMismatch, InvalidRequest
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.vision_engine import OnnxVisionEngine


@pytest.fixture(scope="session")
def vision_onnx(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vision_engine")
    config = tiny_config("qwen2", "6b")
    checkpoint = write_random_checkpoint(directory / "checkpoint", config, tokenizer=False)
    return export_vision(checkpoint, directory / "vision", progress=False)


@pytest.fixture(scope="session")
def engine(vision_onnx):
    return OnnxVisionEngine(vision_onnx, threads=2)


def test_facts_come_from_the_graph(engine):
    assert (engine.tile_size, engine.tokens_per_tile, engine.hidden_size) == (448, 256, 256)
    assert engine.dtype == np.float32


@pytest.mark.parametrize("max_tiles_per_run", [1, 2, 5, 8])
def test_runs_of_any_size_give_the_same_features(vision_onnx, engine, max_tiles_per_run):
    tiles = np.random.default_rng(0).integers(0, 256, (5, 448, 448, 3), dtype=np.uint8)
    expected = np.concatenate([engine.encode(tiles[i : i + 1]) for i in range(5)])
    split = OnnxVisionEngine(vision_onnx, threads=1, max_tiles_per_run=max_tiles_per_run)
    runs = []
    split._session = Recorder(split._session, runs)
    actual = split.encode(tiles)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert sum(runs) == 5
    assert max(runs) <= max_tiles_per_run


class Recorder:
    """An ONNX Runtime session that notes how many tiles each run had."""

    def __init__(self, session, runs: list[int]) -> None:
        self.session, self.runs = session, runs

    def run(self, outputs, feeds):
        self.runs.append(len(feeds["tiles"]))
        return self.session.run(outputs, feeds)


def test_tiles_need_not_be_contiguous(engine):
    tiles = np.random.default_rng(1).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    mirrored = tiles[:, :, ::-1]
    np.testing.assert_array_equal(
        engine.encode(mirrored), engine.encode(np.ascontiguousarray(mirrored))
    )


@pytest.mark.parametrize(
    ("tiles", "given"),
    [
        (np.zeros((1, 448, 448, 3), np.float32), r"float32 \[1, 448, 448, 3\]"),
        (np.zeros((1, 3, 448, 448), np.uint8), r"uint8 \[1, 3, 448, 448\]"),
        (np.zeros((448, 448, 3), np.uint8), r"uint8 \[448, 448, 3\]"),
        (np.zeros((1, 224, 224, 3), np.uint8), r"uint8 \[1, 224, 224, 3\]"),
        (np.zeros((0, 448, 448, 3), np.uint8), "at least 1"),
    ],
)
def test_wrong_tiles_are_refused(engine, tiles, given):
    with pytest.raises(InvalidRequest, match=given):
        engine.encode(tiles)


def test_missing_or_foreign_files_are_refused(vision_onnx, tmp_path):
    with pytest.raises(ArtifactMismatch, match="is missing"):
        OnnxVisionEngine(tmp_path / "vision_encoder.onnx")

    alone = shutil.copy(vision_onnx, tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"onnx\.data is missing"):
        OnnxVisionEngine(alone)

    data = tmp_path / "vision_encoder.onnx.data"
    data.write_bytes(b"truncated")
    with pytest.raises(ArtifactMismatch, match="cannot load"):
        OnnxVisionEngine(alone)

    shutil.copy(vision_onnx.with_name(data.name), data)
    model = onnx.load(alone, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, alone)
    with pytest.raises(ArtifactMismatch, match="not a vision graph of this project"):
        OnnxVisionEngine(alone)


def test_concatenate_makes_memory_of_its_own(engine):
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    copy = engine.concatenate([features[1:3]])
    assert not np.shares_memory(copy, features)
    assert engine.zeros(1).shape == (1, 256)
