"""TensorRT's real parser and builder on the CPU: good graphs compile, broken ones are refused."""

from __future__ import annotations

import os
import sys
from functools import cache
from types import SimpleNamespace

import onnx
import pytest
import tensorrt_rtx
from onnx import helper

from build.check_engines import check_engine, main
from build.vision_engine import TileProfile, build_vision_engine
from export import export_vision
from internvl_triton.errors import ArtifactMismatch, BuildFailed, EngineBuildFailed
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    """vit -> (checkpoint, exported graph), made on first use."""

    @cache
    def graph(vit: str, dtype: str = "BF16"):
        directory = tmp_path_factory.mktemp(f"check_engines_{vit}")
        checkpoint = write_random_checkpoint(
            directory / "checkpoint", tiny_config("qwen2", vit), dtype=dtype, tokenizer=False
        )
        return checkpoint, export_vision(checkpoint, directory / "vision", progress=False)

    return graph


@pytest.fixture
def broken(graphs, tmp_path):
    """A function that writes a graph after `change(model.graph)`, with the same weights."""

    def write(change):
        _, path = graphs("6b")
        model = onnx.load(str(path), load_external_data=False)
        change(model.graph)
        copy = tmp_path / path.name
        onnx.save(model, str(copy))
        os.link(path.with_name(path.name + ".data"), tmp_path / (path.name + ".data"))
        return copy

    return write


def build(onnx_path, plan_path, **options):
    return build_vision_engine(
        onnx_path,
        plan_path,
        **{
            "profile": TileProfile(),
            "trt": tensorrt_rtx,
            "compute_capabilities": ["SM80"],
            "progress": False,
            **options,
        },
    )


@pytest.mark.parametrize(
    ("vit", "dtype"), [("300m", "BF16"), ("6b", "BF16"), ("300m", "F16"), ("6b", "F32")]
)
def test_both_towers_compile(graphs, vit, dtype):
    _, path = graphs(vit, dtype)
    report = check_engine(path, compute_capabilities=["SM80"], max_tiles=26, progress=False)
    assert str(report.profile) == "1/13/26"
    assert report.engine_bytes > report.weight_bytes / (2 if dtype == "F32" else 1)
    assert report.weight_bytes == path.with_name(path.name + ".data").stat().st_size


def test_the_network_is_typed_bfloat16_with_float32_islands(graphs, tmp_path):
    seen = {}

    class Builder(Delegate):
        def build_serialized_network(self, network, config):
            seen["strongly typed"] = network.get_flag(
                tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            )
            seen["tiles"] = network.get_input(0).dtype
            seen["table"] = network.get_output(0).dtype
            for index in range(network.num_layers):
                layer = network.get_layer(index)
                seen[layer.name] = layer.get_output(0).dtype
            return self.builder.build_serialized_network(network, config)

    _, path = graphs("6b")
    build(path, tmp_path / "plan", trt=with_builder(Builder))
    assert seen["strongly typed"]
    assert seen["tiles"] == tensorrt_rtx.uint8
    bfloat16, float32 = tensorrt_rtx.bfloat16, tensorrt_rtx.float32
    assert seen["table"] == bfloat16
    for name, dtype in {
        "normalise/over_std": float32,
        "layer.1/attention/qkv": bfloat16,
        "layer.1/attention/softmax": bfloat16,
        "layer.1/attention/q_norm/divide": float32,
        "layer.1/norm2/divide": float32,
        "layer.1/norm2/multiply": bfloat16,
        "layer.1/mlp/gelu/erf": float32,
        "layer.1/mlp/residual": bfloat16,
        "projector/norm/normalise": float32,
    }.items():
        assert seen[name] == dtype, name


class Delegate:
    """A TensorRT builder; subclasses replace single methods."""

    def __init__(self, log) -> None:
        self.builder = tensorrt_rtx.Builder(log)

    def __getattr__(self, name):
        return getattr(self.builder, name)


def with_builder(builder_class, **more):
    return SimpleNamespace(**{**vars(tensorrt_rtx), "Builder": builder_class, **more})


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_several_architectures_limited_workspace_and_a_timing_cache(graphs, tmp_path):
    _, path = graphs("300m")
    options = {
        "compute_capabilities": ["SM80", "SM89"],
        "workspace_bytes": 1 << 30,
        "timing_cache_path": tmp_path / "timing.cache",
    }
    for _ in range(2):  # writes the cache, then reads it; in TensorRT for RTX it holds nothing
        build(path, tmp_path / "vision_encoder.plan", **options)
        names = sorted(entry.name for entry in tmp_path.iterdir())
        assert names == ["timing.cache", "vision_encoder.plan"]


def transpose_before_the_cast(graph):
    transposed = helper.make_node("Transpose", ["tiles"], ["nchw"], "to_nchw", perm=[0, 3, 1, 2])
    back = helper.make_node("Transpose", ["nchw"], ["nhwc"], "to_nhwc", perm=[0, 2, 3, 1])
    graph.node[0].input[0] = "nhwc"
    graph.node.insert(0, transposed)
    graph.node.insert(1, back)


def exchange_dimensions_of_a_weight(graph):
    (weight,) = (t for t in graph.initializer if t.name == "layer.1/attention/qkv/weight")
    weight.dims[:] = reversed(weight.dims)


def forget_a_cast(graph):
    """A float32 value meets a bfloat16 one: strong typing does not mend that."""
    (add,) = (node for node in graph.node if node.name == "layer.0/mlp/residual")
    add.input[0] = "layer.0/norm2/divide"


def use_an_unknown_operator(graph):
    (erf,) = (node for node in graph.node if node.name == "layer.1/mlp/gelu/erf")
    erf.op_type = "Erfinv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transpose_before_the_cast, "to_nchw.* type UInt8 but must have"),
        (exchange_dimensions_of_a_weight, "layer.1/attention/qkv: last dimension"),
        (forget_a_cast, "layer.0/mlp/residual.* types Float and BFloat16"),
        (use_an_unknown_operator, "layer.1/mlp/gelu/erf"),
    ],
)
def test_a_broken_graph_is_refused_by_name_and_leaves_no_engine(broken, tmp_path, change, message):
    path = broken(change)
    with pytest.raises(EngineBuildFailed, match=message) as refused:
        build(path, tmp_path / "plans" / "vision_encoder.plan")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "plans").exists()


def test_missing_weights_are_refused(graphs, tmp_path):
    _, path = graphs("6b")
    alone = tmp_path / path.name
    alone.write_bytes(path.read_bytes())
    with pytest.raises(ArtifactMismatch, match=r"onnx\.data is missing"):
        build(alone, tmp_path / "plan")


def test_profiles_that_do_not_fit_are_refused(graphs, tmp_path):
    _, path = graphs("300m")
    with pytest.raises(EngineBuildFailed, match="up to 13 with its thumbnail; use max >= 13"):
        build(path, tmp_path / "plan", profile=TileProfile(1, 12, 12))
    with pytest.raises(EngineBuildFailed, match="input 'images'; the graph has: tiles"):
        build(path, tmp_path / "plan", profile=TileProfile(input_name="images"))
    for bad in ((0, 13, 13), (1, 14, 13), (14, 13, 13)):
        with pytest.raises(EngineBuildFailed, match="not ascending"):
            TileProfile(*bad)
    assert list(tmp_path.iterdir()) == []


def test_unknown_architectures_are_refused_with_those_that_exist(graphs, tmp_path):
    _, path = graphs("300m")
    for name in ("SM70", "sm80", "CURRENT", "A100"):
        with pytest.raises(EngineBuildFailed, match=f"{name} .* it compiles for SM75, SM80, "):
            build(path, tmp_path / "plan", compute_capabilities=[name])
    tensorrt = with_builder(tensorrt_rtx.Builder, __name__="tensorrt")
    del tensorrt.ComputeCapability
    with pytest.raises(EngineBuildFailed, match="tensorrt builds for the GPU of this machine only"):
        build(path, tmp_path / "plan", trt=tensorrt)


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("create_network", None, "create the network"),
        ("create_builder_config", None, "create the builder config"),
        ("create_optimization_profile", None, "create the tile profile"),
        ("build_serialized_network", None, "compile"),
    ],
)
def test_every_refusal_of_tensorrt_is_noticed(graphs, tmp_path, method, result, message):
    _, path = graphs("300m")
    refusing = type("Refusing", (Delegate,), {method: lambda *_: result})
    with pytest.raises(EngineBuildFailed, match=f"TensorRT failed to {message}"):
        build(path, tmp_path / "plan", trt=with_builder(refusing))
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_does_not_start_is_noticed(graphs, tmp_path):
    def no_driver(log):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    _, path = graphs("300m")
    with pytest.raises(EngineBuildFailed, match=r"cannot start .*nvidia-smi"):
        build(path, tmp_path / "plan", trt=with_builder(no_driver))


def test_command_line(graphs, broken, tmp_path, capsys):
    checkpoint, path = graphs("300m")
    artifacts = ["--artifacts", str(tmp_path / "artifacts")]
    assert main(["--model", str(checkpoint), "--max-tiles", "13", *artifacts]) == 0
    out = capsys.readouterr().out
    assert "1/13/13" in out
    assert out.endswith("OK: TensorRT compiles the vision graph for SM80\n")

    assert main(["--onnx", str(path), "--compute-capability", "SM80", "SM89"]) == 0
    assert capsys.readouterr().out.endswith("for SM80, SM89\n")

    assert main(["--onnx", str(path), "--max-tiles", "12"]) == 1
    assert main(["--onnx", str(broken(exchange_dimensions_of_a_weight))]) == 1
    assert main(["--onnx", str(tmp_path / "absent.onnx")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 3


def test_without_tensorrt_rtx_the_error_says_where_it_is(graphs, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BuildFailed, match="make test-env"):
        check_engine(graphs("300m")[1], max_tiles=13)
