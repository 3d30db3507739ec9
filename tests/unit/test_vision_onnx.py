"""The exported graph in ONNX Runtime against transformers' port: tests.oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import export.vision_graph
from export import export_vision
from export.vision_graph import VisionGraph
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.errors import (
    BuildFailed,
    IncompleteCheckpoint,
    InvalidCheckpoint,
    UnsupportedCheckpoint,
)
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.vision_engine import OnnxVisionEngine
from tests.oracle import Oracle

PARITY = 1e-4  # max |difference| / max |reference|


def random_tiles(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 448, 448, 3), dtype=np.uint8)


def features(onnx_path: Path, tiles: np.ndarray) -> np.ndarray:
    return OnnxVisionEngine(onnx_path, threads=2).encode(tiles)


def difference(actual: np.ndarray, reference: np.ndarray) -> float:
    assert actual.shape == reference.shape
    return float(np.abs(actual - reference).max() / np.abs(reference).max())


def checkpoint(directory: Path, vit: str, **kwargs) -> Path:
    options = {key: kwargs.pop(key) for key in ("dtype", "shards") if key in kwargs}
    config = {**tiny_config("qwen2", vit, **kwargs.pop("sizes", {})), **kwargs}
    return write_random_checkpoint(directory, config, tokenizer=False, **options)


def with_config(source: Path, directory: Path, change) -> Path:
    """A copy of `source` after `change(config)`."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """vit -> (small BF16 checkpoint, its oracle), made on first use."""

    @cache
    def tower(vit: str) -> tuple[Path, Oracle]:
        directory = checkpoint(tmp_path_factory.mktemp("vision_onnx") / vit, vit)
        return directory, Oracle(directory)

    return tower


@pytest.mark.parametrize("vit", ["300m", "6b"])
@pytest.mark.parametrize("num_tiles", [1, 3, 13])
def test_parity(towers, tmp_path, vit, num_tiles):
    directory, oracle = towers(vit)
    tiles = random_tiles(num_tiles)
    actual = features(export_vision(directory, tmp_path / "vision", progress=False), tiles)
    assert actual.shape == (num_tiles * 256, 256)
    assert difference(actual, oracle.visual_features(tiles)) < PARITY


@pytest.mark.parametrize(
    ("vit", "options"),
    [
        ("300m", {"dtype": "F32", "shards": 3}),
        ("300m", {"dtype": "F16", "sizes": {"vision_hidden": 256}}),  # head_dim 128
        ("6b", {"dtype": "F32", "sizes": {"vision_hidden": 80, "vision_heads": 5}}),  # trap 17
        ("6b", {"dtype": "F16", "shards": 4, "sizes": {"vision_layers": 4}}),
        ("6b", {"downsample_ratio": 0.25}),  # 64 tokens per tile
    ],
    ids=["f32-sharded", "f16-head_dim-128", "f32-odd-heads", "f16-sharded", "bf16-ratio-1/4"],
)
def test_parity_of_other_checkpoints(tmp_path, vit, options):
    directory = checkpoint(tmp_path / "checkpoint", vit, **options)
    tiles = random_tiles(1)
    actual = features(export_vision(directory, tmp_path / "vision", progress=False), tiles)
    assert difference(actual, Oracle(directory).visual_features(tiles)) < PARITY


def test_pixel_shuffle_v1_is_v2_with_rows_and_columns_exchanged(towers, tmp_path):
    """Trap 3: the projector sees one token at a time, so only their order may differ."""
    directory, oracle = towers("300m")

    def class_default(config):  # an absent ps_version means v1
        del config["ps_version"]

    v1 = with_config(directory, tmp_path / "v1", class_default)
    tiles = random_tiles(1)
    actual = features(export_vision(v1, tmp_path / "vision", progress=False), tiles)
    reference = oracle.visual_features(tiles)
    assert difference(actual, reference) > 100 * PARITY
    exchanged = actual.reshape(16, 16, -1).swapaxes(0, 1).reshape(256, -1)
    assert difference(exchanged, reference) < PARITY


def test_absent_keys_take_the_class_defaults(towers, tmp_path):
    """Trap 4: InternViT-6B's own config.json leaves out norm_type."""
    directory, oracle = towers("6b")

    def leave_out(config):
        for key in ("norm_type", "qk_normalization", "qkv_bias", "layer_norm_eps", "hidden_act"):
            del config["vision_config"][key]

    sparse = with_config(directory, tmp_path / "sparse", leave_out)
    tiles = random_tiles(1)
    actual = features(export_vision(sparse, tmp_path / "vision", progress=False), tiles)
    assert difference(actual, oracle.visual_features(tiles)) < PARITY


@pytest.mark.parametrize("vit", ["300m", "6b"])
def test_each_norm_has_its_own_epsilon(tmp_path, monkeypatch, vit):
    """Trap 15, on activations whose variance is near the epsilons, so that these matter."""
    directory = checkpoint(tmp_path / "checkpoint", vit, dtype="F32")
    weights = load_file(directory / "model.safetensors")
    for name in weights:
        if ".embeddings." in name or name.endswith((".ls1", ".ls2")):
            weights[name] *= np.float32(2e-3)
    save_file(weights, directory / "model.safetensors")
    tiles = random_tiles(1)
    reference = Oracle(directory).visual_features(tiles)

    def exported(source: Path, name: str) -> float:
        path = export_vision(source, tmp_path / name, progress=False)
        return difference(features(path, tiles), reference)

    assert exported(directory, "right") < PARITY
    tower = with_config(
        directory, tmp_path / "tower", lambda c: c["vision_config"].update(layer_norm_eps=1e-5)
    )
    assert exported(tower, "tower_1e-5") > 10 * PARITY
    monkeypatch.setattr(export.vision_graph, "PROJECTOR_EPS", 1e-6)
    assert exported(directory, "projector_1e-6") > 10 * PARITY


def test_parity_notices_q_and_k_normalised_per_head(towers, tmp_path, monkeypatch):
    """Trap 16: the norm spans all heads."""
    directory, oracle = towers("6b")
    over_all_heads = VisionGraph.rms_norm

    def per_head(self, name, x, source):
        if name.endswith(("q_norm", "k_norm")):
            vision = self.vision
            split = self.reshape(f"{name}/split", x, [0, 0, vision.num_heads, vision.head_dim])
            two = self.graph.constant(f"{name}/exponent", 2)
            square = self.node("Pow", f"{name}/square_of_head", split, two)
            mean = self.node("ReduceMean", f"{name}/mean_of_head", square, axes=[-1])
            root = self.node("Sqrt", f"{name}/rms_of_head", mean)
            unit = self.node("Div", f"{name}/unit_heads", split, root)
            x = self.reshape(f"{name}/merged", unit, [0, 0, vision.hidden_size])
        return over_all_heads(self, name, x, source)

    monkeypatch.setattr(VisionGraph, "rms_norm", per_head)
    tiles = random_tiles(1)
    actual = features(export_vision(directory, tmp_path / "vision", progress=False), tiles)
    assert difference(actual, oracle.visual_features(tiles)) > 10 * PARITY


def test_select_layer_drops_the_last_layers(towers, tmp_path):
    _, oracle = towers("300m")  # two layers, seeded by their names
    config = tiny_config("qwen2", "300m", vision_layers=3) | {"select_layer": -2}
    deeper = write_random_checkpoint(tmp_path / "deeper", config, tokenizer=False)
    tiles = random_tiles(1)
    actual = features(export_vision(deeper, tmp_path / "vision", progress=False), tiles)
    assert difference(actual, oracle.visual_features(tiles)) < PARITY


@pytest.mark.parametrize("vit", ["300m", "6b"])
def test_graph(towers, tmp_path, vit):
    directory, _ = towers(vit)
    path = export_vision(directory, tmp_path / "vision", progress=False)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "vision_encoder.onnx",
        "vision_encoder.onnx.data",
    ]
    model = onnx.load(str(path), load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    first = model.graph.node[0]
    assert (first.op_type, list(first.input)) == ("Cast", ["tiles"])
    assert "layer.1/attention/softmax" in nodes
    assert describe(model.graph.input[0]) == ("tiles", "UINT8", ["num_tiles", 448, 448, 3])
    assert describe(model.graph.output[0]) == (
        "prompt_embedding_table",
        "FLOAT",
        ["num_visual_tokens", 256],
    )
    casts = [node for node in nodes.values() if node.op_type == "Cast"]
    assert all(node.name.endswith(("/to_compute", "/to_float")) for node in casts)
    if vit == "6b":  # rounded to the compute type before the weight is multiplied
        assert nodes["layer.0/norm1/to_compute"].input == ["layer.0/norm1/divide"]
        assert nodes["layer.0/norm1/multiply"].input[0] == "layer.0/norm1/to_compute"


def describe(value) -> tuple[str, str, list[int | str]]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return value.name, onnx.TensorProto.DataType.Name(kind.elem_type), shape


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_weights_keep_the_dtype_and_the_bits_of_the_checkpoint(tmp_path, dtype):
    directory = checkpoint(tmp_path / "checkpoint", "300m", dtype=dtype)
    path = export_vision(directory, tmp_path / "vision", progress=False)
    tensors = {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}
    source = Checkpoint(directory)
    for ours, theirs in (
        ("layer.1/attention/qkv/weight", "vision_model.encoder.layers.1.attn.qkv.weight"),
        ("projector/fc1/weight", "mlp1.1.weight"),
        ("projector/fc1/bias", "mlp1.1.bias"),
    ):
        stored, original = numpy_helper.to_array(tensors[ours]), source.read(theirs)
        if stored.dtype != ml_dtypes.bfloat16 and dtype == "BF16":  # how older onnx returns it
            stored = stored.astype(ml_dtypes.bfloat16)
        assert stored.dtype == original.dtype
        assert stored.T.tobytes() == np.ascontiguousarray(original).tobytes()


def test_only_the_vision_tower_and_the_projector_are_read(towers, tmp_path):
    directory, oracle = towers("300m")
    vision_only = with_config(directory, tmp_path / "vision_only", lambda config: None)
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if not name.startswith("language_model.")},
        vision_only / "model.safetensors",
    )
    tiles = random_tiles(1)
    actual = features(export_vision(vision_only, tmp_path / "vision", progress=False), tiles)
    assert difference(actual, oracle.visual_features(tiles)) < PARITY


def test_incomplete_checkpoints_leave_nothing(tmp_path):
    directory = checkpoint(tmp_path / "checkpoint", "300m", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(IncompleteCheckpoint, match="model-00002-of-00003"):
        export_vision(directory, tmp_path / "vision", progress=False)

    single = checkpoint(tmp_path / "single", "300m")
    weights = load_file(single / "model.safetensors")
    del weights["mlp1.3.bias"]
    save_file(weights, single / "model.safetensors")
    with pytest.raises(IncompleteCheckpoint, match=r"mlp1\.3\.bias"):
        export_vision(single, tmp_path / "vision", progress=False)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint", "single"}


def test_wrong_shapes_types_and_architectures_are_refused(towers, tmp_path):
    directory, _ = towers("300m")
    wider = with_config(
        directory, tmp_path / "wider", lambda c: c["vision_config"].update(intermediate_size=96)
    )
    with pytest.raises(InvalidCheckpoint, match=r"mlp\.fc1\.weight has shape \(128, 64\)"):
        export_vision(wider, tmp_path / "vision", progress=False)

    weights = load_file(directory / "model.safetensors")
    weights["mlp1.3.bias"] = weights["mlp1.3.bias"].astype(np.int8)
    integer = with_config(directory, tmp_path / "integer", lambda config: None)
    save_file(weights, integer / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"mlp1\.3\.bias is stored as I8; supported"):
        export_vision(integer, tmp_path / "vision", progress=False)

    other = with_config(directory, tmp_path / "other", lambda c: c.update(model_type="llava"))
    with pytest.raises(UnsupportedCheckpoint, match="llava"):
        export_vision(other, tmp_path / "vision", progress=False)
    assert not (tmp_path / "vision").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError("disk full")])
def test_an_export_that_dies_leaves_nothing_and_keeps_the_old_one(
    towers, tmp_path, monkeypatch, failure
):
    directory, _ = towers("300m")
    reads = 0

    def read_ten(self, name):
        nonlocal reads
        reads += 1
        if reads > 10:
            raise failure
        return read(self, name)

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read_ten)
    with pytest.raises((KeyboardInterrupt, MemoryError, OSError)):
        export_vision(directory, tmp_path / "vision", progress=False)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(Checkpoint, "read", read)
    finished = export_vision(directory, tmp_path / "vision", progress=False)
    before = finished.read_bytes()
    reads = 0
    monkeypatch.setattr(Checkpoint, "read", read_ten)
    with pytest.raises((KeyboardInterrupt, MemoryError, OSError)):
        export_vision(directory, tmp_path / "vision", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["vision"]
    assert finished.read_bytes() == before


def test_files_of_others_are_never_replaced(towers, tmp_path):
    directory, _ = towers("300m")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BuildFailed, match=r"thesis\.txt"):
        export_vision(directory, tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_help_needs_none_of_the_heavy_packages():
    heavy = ("onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "torch", "transformers")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}))\n"
        "import runpy, internvl_triton.feature_cache\n"
        "from export import export_vision\n"
        "sys.argv = ['x', '--help']; runpy.run_module('build.check_engines', run_name='__main__')"
    )
    for command in (
        ["-c", program],
        ["-W", "error", "-m", "export.vision_onnx", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=True, timeout=60
        )
        assert "usage: python -m" in done.stdout
        assert not done.stderr


def test_command_line(towers, tmp_path, capsys):
    from export.vision_onnx import main

    directory, _ = towers("300m")
    assert main(["--checkpoint", str(directory), "--output", str(tmp_path / "vision")]) == 0
    assert (tmp_path / "vision" / "vision_encoder.onnx").is_file()
    assert main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "vision")]) == 1
    assert "has no config.json" in capsys.readouterr().err
