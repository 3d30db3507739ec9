"""Build a TensorRT engine from the vision graph: `tensorrt` on a GPU, `tensorrt_rtx` on any CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from build.tensorrt_callbacks import new_log, new_progress_monitor
from internvl_triton.errors import ArtifactMismatch, EngineBuildFailed
from internvl_triton.vision_engine import TILES, TO_COMPUTE

__all__ = ["EngineReport", "TileProfile", "build_vision_engine"]


@dataclass(frozen=True)
class TileProfile:
    """How many tiles one run of the engine may have; it is fastest at `optimal`.

    13 = 12 tiles + thumbnail: an image at InternVL2.5's default limit.
    """

    minimum: int = 1
    optimal: int = 13
    maximum: int = 13
    input_name: str = TILES

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimal <= self.maximum:
            raise EngineBuildFailed(
                f"tile profile {self} is not ascending; it needs 1 <= min <= opt <= max"
            )

    def __str__(self) -> str:
        return f"{self.minimum}/{self.optimal}/{self.maximum}"


@dataclass(frozen=True)
class EngineReport:
    """What was built. `num_layers` counts the parsed network, before TensorRT fuses it."""

    profile: TileProfile
    compute_capabilities: tuple[str, ...]
    num_layers: int
    weight_bytes: int
    engine_bytes: int
    duration_s: float


def build_vision_engine(
    onnx_path: Path,
    plan_path: Path,
    *,
    profile: TileProfile,
    trt: ModuleType,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache_path: Path | None = None,
    progress: bool = True,
) -> EngineReport:
    """Compile the graph, strongly typed in bfloat16, to `plan_path`.

    trt: the module `tensorrt` or `tensorrt_rtx`.
    compute_capabilities: such as ("SM80", "SM89"), compiled ahead of time without a GPU; only
    `tensorrt_rtx` can. Empty means the GPU of this machine.
    workspace_bytes: limit of the engine's scratch memory; None leaves it to TensorRT.
    timing_cache_path: kernel timings are read from and written to this file, if TensorRT has any.

    Raises EngineBuildFailed naming the step and TensorRT's own message; `plan_path` appears only
    when everything succeeded.
    """
    started = time.monotonic()
    log = new_log(trt)
    graph, weight_bytes, required_tiles = _bfloat16_graph(Path(onnx_path))
    if profile.maximum < required_tiles:
        raise EngineBuildFailed(
            f"tile profile {profile} ends at {profile.maximum} tiles, but one image of this "
            f"checkpoint has up to {required_tiles} with its thumbnail; use max >= {required_tiles}"
        )
    builder = _new_builder(trt, log)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _checked(builder.create_network(strongly_typed), "create the network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph, str(onnx_path)):
        raise EngineBuildFailed(f"TensorRT cannot parse {onnx_path}: {_parser_errors(parser, log)}")

    config = _checked(builder.create_builder_config(), "create the builder config", log)
    _add_profile(builder, network, config, profile, log)
    _set_compute_capabilities(trt, config, compute_capabilities)
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    cache = _load_timing_cache(config, timing_cache_path, log)
    if progress and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = new_progress_monitor(trt)

    plan = _checked(builder.build_serialized_network(network, config), f"compile {onnx_path}", log)
    _write_atomically(plan_path, plan)
    if cache is not None and timing_cache_path is not None:
        _write_atomically(timing_cache_path, cache.serialize())
    return EngineReport(
        profile=profile,
        compute_capabilities=tuple(compute_capabilities),
        num_layers=network.num_layers,
        weight_bytes=weight_bytes,
        engine_bytes=plan.nbytes,
        duration_s=time.monotonic() - started,
    )


def _new_builder(trt: ModuleType, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except TypeError as error:  # pybind11's word for a factory that returned null
        raise EngineBuildFailed(
            f"{trt.__name__} {trt.__version__} cannot start ({log.summary()}); "
            "`nvidia-smi` shows whether this machine has a GPU and its driver"
        ) from error


def _bfloat16_graph(onnx_path: Path) -> tuple[bytes, int, int]:
    """The graph with bfloat16 as its compute type, the bytes of its weights, tiles per image.

    The weights stay in their file: the parser finds it next to `onnx_path`.
    """
    import onnx

    bfloat16 = onnx.TensorProto.BFLOAT16
    data_path = onnx_path.with_name(onnx_path.name + ".data")
    for path in (onnx_path, data_path):
        if not path.is_file():
            raise ArtifactMismatch(f"{path} is missing; export the vision graph again")
    model = onnx.load(str(onnx_path), load_external_data=False)
    casts = [node for node in model.graph.node if node.name.endswith(TO_COMPUTE)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if not casts or "max_tiles_with_thumbnail" not in metadata:
        raise ArtifactMismatch(f"{onnx_path} is not a vision graph of this project")
    for node in casts:
        (to,) = (attribute for attribute in node.attribute if attribute.name == "to")
        to.i = bfloat16
    for output in model.graph.output:
        output.type.tensor_type.elem_type = bfloat16
    return (
        model.SerializeToString(),
        data_path.stat().st_size,
        int(metadata["max_tiles_with_thumbnail"]),
    )


def _add_profile(builder: Any, network: Any, config: Any, profile: TileProfile, log: Any) -> None:
    inputs = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        inputs[tensor.name] = tuple(tensor.shape)
    if profile.input_name not in inputs:
        raise EngineBuildFailed(
            f"tile profile is for input {profile.input_name!r}; the graph has: {', '.join(inputs)}"
        )
    tile_shape = inputs[profile.input_name][1:]
    shapes = _checked(builder.create_optimization_profile(), "create the tile profile", log)
    shapes.set_shape(
        profile.input_name,
        *((tiles, *tile_shape) for tiles in (profile.minimum, profile.optimal, profile.maximum)),
    )
    if config.add_optimization_profile(shapes) < 0:
        raise EngineBuildFailed(f"TensorRT refused tile profile {profile}: {log.summary()}")


def _set_compute_capabilities(trt: ModuleType, config: Any, names: Sequence[str]) -> None:
    if not names:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise EngineBuildFailed(
            f"{trt.__name__} builds for the GPU of this machine only; to compile for "
            f"{', '.join(names)} use tensorrt_rtx"
        )
    known = trt.ComputeCapability.__members__
    unknown = [name for name in names if not name.startswith("SM") or name not in known]
    if unknown:
        allowed = ", ".join(
            sorted((n for n in known if n.startswith("SM")), key=lambda n: int(n[2:]))
        )
        raise EngineBuildFailed(
            f"compute capability {', '.join(unknown)} is unknown to {trt.__name__} "
            f"{trt.__version__}; it compiles for {allowed}"
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(known[name], index):
            raise EngineBuildFailed(f"{trt.__name__} refused compute capability {name}")


def _load_timing_cache(config: Any, path: Path | None, log: Any) -> Any:
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineBuildFailed(
            f"TensorRT cannot use timing cache {path}: delete it ({log.summary()})"
        )
    return cache


def _checked(result: Any, step: str, log: Any) -> Any:
    if result is None:  # not `not result`: a network is as long as its layers
        raise EngineBuildFailed(f"TensorRT failed to {step}: {log.summary()}")
    return result


def _parser_errors(parser: Any, log: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    described = [f"node {e.node_name()!r} ({e.node_operator()}): {_one_line(e)}" for e in errors]
    return " | ".join(described) or log.summary()


def _one_line(error: Any) -> str:
    lines = error.desc().strip().splitlines()
    # WAR: without a GPU, tensorrt_rtx adds "CUDA driver version is insufficient" to any error.
    return "; ".join(line for line in lines if "catchCudaError" not in line)


def _write_atomically(path: Path, content: Any) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
