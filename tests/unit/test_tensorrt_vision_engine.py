"""The GPU profile's vision engine: how tiles are split, and that nothing is mixed up on the way.

No GPU here: torch computes on the CPU, and a stand-in for TensorRT's runtime reads and writes the
memory it is given. Its methods are checked against the real classes of TensorRT for RTX.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.errors import ArtifactMismatch, EngineError, InvalidRequest
from internvl_triton.feature_cache import FeatureCache, VisionEncoder
from internvl_triton.tensorrt_vision_engine import (
    CudaEngine,
    Run,
    TensorrtVisionEngine,
    split_runs,
)
from internvl_triton.triton_adapter import response
from internvl_triton.vision_engine import PROMPT_EMBEDDING_TABLE, TILES
from internvl_triton.vision_runtime import load_vision_engine

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

SIZE, TOKENS, HIDDEN, MAX_TILES = 28, 4, 8, 5


def test_13_tiles_on_4_gpus() -> None:
    runs = split_runs(13, num_gpus=4, max_tiles=26)
    assert runs == [Run(0, 0, 4), Run(1, 4, 3), Run(2, 7, 3), Run(3, 10, 3)]


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("max_tiles", [1, 13, 26])
def test_every_tile_runs_once_and_in_order(num_gpus: int, max_tiles: int) -> None:
    for num_tiles in range(1, 100):
        runs = split_runs(num_tiles, num_gpus=num_gpus, max_tiles=max_tiles)
        tiles = [tile for run in runs for tile in range(run.first, run.first + run.count)]
        assert tiles == list(range(num_tiles))
        assert all(1 <= run.count <= max_tiles for run in runs)
        assert [run.gpu for run in runs] == sorted(run.gpu for run in runs)
        share = [sum(run.count for run in runs if run.gpu == gpu) for gpu in range(num_gpus)]
        assert max(share) - min(share) <= 1
        # No more runs than needed for the busiest GPU.
        busiest = max(sum(run.gpu == gpu for run in runs) for gpu in range(num_gpus))
        assert busiest == -(-max(share) // max_tiles)


class FakeTensorrt:
    """A runtime whose "engine" gives each tile's mean, plus the token's number, in every column."""

    __version__ = "10.11.0.33"

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    def __init__(self, *, refuses_plan: bool = False, refuses_run: bool = False) -> None:
        self.refuses_plan, self.refuses_run = refuses_plan, refuses_run
        self.names = [TILES, PROMPT_EMBEDDING_TABLE]
        self.runs: list[int] = []

    def Runtime(self, log: object) -> SimpleNamespace:  # noqa: N802 - TensorRT's name
        engine = None if self.refuses_plan else FakeEngine(self)
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)


class FakeEngine:
    def __init__(self, trt: FakeTensorrt) -> None:
        self.trt = trt
        self.num_io_tensors = len(trt.names)

    def get_tensor_name(self, index: int) -> str:
        return self.trt.names[index]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == (TILES, 0)
        return [(tiles, SIZE, SIZE, 3) for tiles in (1, 3, MAX_TILES)]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self.trt)


class FakeContext:
    def __init__(self, trt: FakeTensorrt) -> None:
        self.trt = trt
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == TILES
        self.shape = shape
        return 1 <= shape[0] <= MAX_TILES

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == PROMPT_EMBEDDING_TABLE
        return (self.shape[0] * TOKENS, HIDDEN)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        count = self.shape[0]
        self.trt.runs.append(count)
        pixels = (ctypes.c_uint8 * int(np.prod(self.shape))).from_address(self.addresses[TILES])
        tiles = np.frombuffer(pixels, np.uint8).reshape(self.shape)
        table = torch.from_numpy(features(tiles)).to(torch.bfloat16).contiguous()
        ctypes.memmove(self.addresses[PROMPT_EMBEDDING_TABLE], table.data_ptr(), table.nbytes)
        return not self.trt.refuses_run


def features(tiles: np.ndarray) -> np.ndarray:
    """What the stand-in computes, exact in bfloat16 for tiles of one small grey each."""
    means = tiles.reshape(len(tiles), -1).mean(axis=1).round()
    rows = means[:, None] + np.arange(TOKENS) / 4
    return np.repeat(rows.reshape(-1, 1), HIDDEN, axis=1).astype(np.float32)


def test_the_real_classes_have_what_is_called() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    for real, fake in (
        (rtx.Runtime, {"deserialize_cuda_engine"}),
        (rtx.ICudaEngine, vars(FakeEngine).keys() | {"num_io_tensors"}),
        (rtx.IExecutionContext, vars(FakeContext).keys()),
    ):
        public = {name for name in fake if not name.startswith("_")}
        assert public <= set(dir(real)), real
    assert hasattr(rtx.Logger, "ERROR")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CUDA calls do nothing, and its CUDA devices are the CPU."""
    cpu = torch.device("cpu")
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch, "device", lambda *_: cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def greys(*values: int) -> np.ndarray:
    return np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in values])


def engine_on(num_gpus: int, trt: FakeTensorrt, table_dtype: str = "BF16") -> TensorrtVisionEngine:
    return TensorrtVisionEngine(
        [CudaEngine(b"plan", gpu, trt=trt) for gpu in range(num_gpus)], table_dtype=table_dtype
    )


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
@pytest.mark.parametrize("num_tiles", [1, 4, 13, 23])
@pytest.mark.parametrize(("table_dtype", "dtype"), [("BF16", "bfloat16"), ("FP16", "float16")])
def test_features_are_those_of_the_tiles_in_their_order(
    num_gpus: int, num_tiles: int, table_dtype: str, dtype: str
) -> None:
    trt = FakeTensorrt()
    engine = engine_on(num_gpus, trt, table_dtype)
    assert (engine.tile_size, engine.tokens_per_tile, engine.hidden_size) == (SIZE, TOKENS, HIDDEN)
    tiles = greys(*range(1, num_tiles + 1))
    table = engine.encode(tiles)
    assert table.dtype == getattr(torch, dtype)
    assert sum(trt.runs) == num_tiles
    assert max(trt.runs) <= MAX_TILES
    np.testing.assert_array_equal(table.float().numpy(), features(tiles))


@pytest.mark.usefixtures("on_cpu")
def test_rows_are_copied_and_zeros_have_the_tables_dtype() -> None:
    engine = engine_on(1, FakeTensorrt())
    table = engine.encode(greys(1, 2))
    part = engine.concatenate([table[:TOKENS]])
    assert part.untyped_storage().nbytes() == part.nbytes  # its own memory: the cache counts it
    zeros = engine.zeros(1)
    assert (tuple(zeros.shape), zeros.dtype, bool(zeros.any())) == ((1, HIDDEN), table.dtype, False)


@pytest.mark.usefixtures("on_cpu")
def test_the_feature_cache_works_with_it() -> None:
    trt = FakeTensorrt()
    one_image = 3 * TOKENS * HIDDEN * 2
    encoder = VisionEncoder(engine_on(2, trt), FeatureCache(2 * one_image))
    tiles = greys(1, 2, 3, 9)

    def ask(first: int, *images: int):
        counts = np.array(images, np.int32)
        digests = np.arange(first, first + 2 * len(images), dtype=np.uint64).reshape(-1, 2)
        return encoder.encode(tiles[: counts.sum()], counts, digests)

    assert ask(0, 3, 1).tiles_run == 4
    again = ask(0, 3, 1)
    assert (again.tiles_run, again.hits) == (0, 2)
    np.testing.assert_array_equal(again.features.float().numpy(), features(tiles))
    text_only = encoder.encode(tiles[:0], np.empty(0, np.int32), np.empty((0, 2), np.uint64))
    assert tuple(text_only.features.shape) == (1, HIDDEN)
    assert encoder.cache.num_bytes == 4 * TOKENS * HIDDEN * 2


@pytest.mark.usefixtures("on_cpu")
def test_features_leave_as_gpu_tensors() -> None:
    """numpy has no bfloat16: Triton gets the tensor itself."""

    class FakeTensor:
        def __init__(self, name: str, value: np.ndarray) -> None:
            raise AssertionError("features went through numpy")

        @staticmethod
        def from_dlpack(name: str, value: object) -> tuple[str, object]:
            return name, torch.from_dlpack(value)

    pb_utils = SimpleNamespace(
        Tensor=FakeTensor, InferenceResponse=lambda output_tensors: output_tensors
    )
    table = engine_on(1, FakeTensorrt()).encode(greys(5))[None]
    ((name, received),) = response(pb_utils, {contract.PROMPT_EMBEDDING_TABLE.name: table})
    assert name == "prompt_embedding_table"
    assert received.data_ptr() == table.data_ptr()
    assert (tuple(received.shape), received.dtype) == ((1, TOKENS, HIDDEN), torch.bfloat16)


@pytest.mark.usefixtures("on_cpu")
def test_refusals() -> None:
    engine = engine_on(1, FakeTensorrt())
    for tiles in (np.zeros((1, SIZE, SIZE, 3), np.float32), np.zeros((1, 3, SIZE, SIZE), np.uint8)):
        with pytest.raises(InvalidRequest, match=r"takes uint8 \[num_tiles, 28, 28, 3\]"):
            engine.encode(tiles)
    with pytest.raises(InvalidRequest, match="no tile"):
        engine.encode(greys(1)[:0])
    with pytest.raises(EngineError, match="refused to run 1 tiles"):
        engine_on(1, FakeTensorrt(refuses_run=True)).encode(greys(1))
    with pytest.raises(
        ArtifactMismatch, match=r"10\.11\.0\.33 refuses vision_encoder\.plan on GPU"
    ):
        engine_on(1, FakeTensorrt(refuses_plan=True))
    other = FakeTensorrt()
    other.names = ["input", "output"]
    with pytest.raises(ArtifactMismatch, match="has the tensors input, output; expected tiles"):
        engine_on(1, other)


def test_the_parameter_runtime_chooses_the_engine(tmp_path: Path, monkeypatch) -> None:
    artifacts = Artifacts(tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"vision_encoder\.onnx is missing"):
        load_vision_engine(artifacts, {"runtime": "onnxruntime"})
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorrt())
    with pytest.raises(ArtifactMismatch, match=r"vision_encoder\.plan is missing"):
        load_vision_engine(
            artifacts, {"runtime": "tensorrt", "num_gpus": "1", "table_dtype": "BF16"}
        )
