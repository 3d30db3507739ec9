"""Run the vision graph on GPUs: the engine of the `gpu` profile.

Data parallel: every GPU holds the whole engine, and a request's tiles are split over the GPUs
(InternViT-6B has 25 heads, which tensor parallelism does not divide).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import ArtifactMismatch, EngineError
from internvl_triton.vision_engine import PROMPT_EMBEDDING_TABLE, TILES, check_tiles

__all__ = ["CudaEngine", "DeviceEngine", "Run", "TensorrtVisionEngine", "split_runs"]

TORCH_DTYPES = {"BF16": "bfloat16", "FP16": "float16"}


@dataclass(frozen=True)
class Run:
    """Tiles [first, first + count) of a request, run at once on GPU number `gpu`."""

    gpu: int
    first: int
    count: int


def split_runs(num_tiles: int, *, num_gpus: int, max_tiles: int) -> list[Run]:
    """All tiles in their order: equal shares for the GPUs, each in runs of at most max_tiles.

    13 tiles on 4 GPUs: 4, 3, 3, 3. 60 tiles on 2 GPUs, at most 26 a run: 15, 15, 15, 15.
    """
    runs = []
    first = 0
    for gpu, share in enumerate(_equal_parts(num_tiles, num_gpus)):
        for count in _equal_parts(share, -(-share // max_tiles)):
            if count:
                runs.append(Run(gpu, first, count))
                first += count
    return runs


def _equal_parts(total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` integers that differ by at most one, the largest first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


class DeviceEngine(Protocol):
    """The engine on one GPU. `start` returns at once; its result may be used after `wait`."""

    @property
    def max_tiles(self) -> int: ...

    @property
    def tile_size(self) -> int: ...

    @property
    def tokens_per_tile(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def device(self) -> Any: ...

    def start(self, tiles: NDArray[np.uint8]) -> Any:
        """uint8 (1 <= num_tiles <= max_tiles, S, S, 3) -> bfloat16 tensor on `device`,
        (num_tiles * tokens_per_tile, hidden_size)."""
        ...

    def wait(self) -> None: ...


class TensorrtVisionEngine:
    """`vision_encoder.plan` in TensorRT, on one or more GPUs.

    Visual features are torch tensors of `table_dtype` on the first GPU, where the language
    model's rank 0 reads them. Nothing is pending on them when a method returns.
    """

    def __init__(self, engines: Sequence[DeviceEngine], *, table_dtype: str) -> None:
        import torch

        assert engines
        self._engines = engines
        self._device = engines[0].device
        self._dtype = getattr(torch, TORCH_DTYPES[table_dtype])
        self.tile_size = engines[0].tile_size
        self.hidden_size = engines[0].hidden_size
        self.tokens_per_tile = engines[0].tokens_per_tile

    @classmethod
    def load(cls, plan_path: Path, *, num_gpus: int, table_dtype: str) -> TensorrtVisionEngine:
        """The engine on the GPUs 0 .. num_gpus - 1.

        Raises ArtifactMismatch when the plan is missing or TensorRT refuses it.
        """
        import tensorrt

        if not plan_path.is_file():
            raise ArtifactMismatch(f"{plan_path.name} is missing; run `make engines` again")
        plan = plan_path.read_bytes()
        return cls(
            [CudaEngine(plan, gpu, trt=tensorrt) for gpu in range(num_gpus)],
            table_dtype=table_dtype,
        )

    def encode(self, tiles: NDArray[np.uint8]) -> Any:
        """uint8 (num_tiles >= 1, S, S, 3) -> tensor (num_tiles * tokens_per_tile, hidden_size).

        Raises InvalidRequest for another shape or dtype, or for no tile at all.
        """
        import torch

        check_tiles(tiles, self.tile_size)
        runs = split_runs(
            len(tiles), num_gpus=len(self._engines), max_tiles=self._engines[0].max_tiles
        )
        parts = [
            self._engines[run.gpu].start(tiles[run.first : run.first + run.count]) for run in runs
        ]
        for engine in self._engines:
            engine.wait()
        return self._finished(
            torch.cat([part.to(device=self._device, dtype=self._dtype) for part in parts])
        )

    def concatenate(self, parts: Sequence[Any]) -> Any:
        """Rows of all parts in memory of their own, also for a single part."""
        import torch

        return self._finished(torch.cat(list(parts)))

    def zeros(self, num_rows: int) -> Any:
        """(num_rows, hidden_size) of zeros."""
        import torch

        shape = (num_rows, self.hidden_size)
        return self._finished(torch.zeros(shape, dtype=self._dtype, device=self._device))

    def _finished(self, tensor: Any) -> Any:
        """`tensor`, computed: Triton reads it in another process, on another stream."""
        import torch

        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return tensor


class CudaEngine:
    """The plan on one GPU, with a context and a stream of its own."""

    def __init__(self, plan: bytes, gpu: int, *, trt: Any) -> None:
        """Raises ArtifactMismatch when TensorRT refuses the plan or it is not our graph."""
        import torch

        self.device = torch.device("cuda", gpu)
        with torch.cuda.device(self.device):
            # TensorRT's own reasons go to the server's log.
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise ArtifactMismatch(
                    f"TensorRT {trt.__version__} refuses vision_encoder.plan on GPU {gpu}: it was "
                    "built with another version or for another GPU; run `make engines` again"
                )
            names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
            if names != {TILES, PROMPT_EMBEDDING_TABLE}:
                raise ArtifactMismatch(
                    f"vision_encoder.plan has the tensors {', '.join(sorted(names))}; expected "
                    f"{TILES} and {PROMPT_EMBEDDING_TABLE}; run `make engines` again"
                )
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise ArtifactMismatch(
                    f"the vision engine does not fit into the memory of GPU {gpu}; lower "
                    "max_tiles_per_run, or free the memory that other programs use (nvidia-smi)"
                )
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        _, _, largest = self._engine.get_tensor_profile_shape(TILES, 0)
        self.max_tiles = int(largest[0])
        self.tile_size = int(largest[1])
        self._context.set_input_shape(TILES, (1, *largest[1:]))
        rows, hidden = self._context.get_tensor_shape(PROMPT_EMBEDDING_TABLE)
        self.tokens_per_tile, self.hidden_size = int(rows), int(hidden)

    @property
    def stream(self) -> Any:
        """The CUDA stream that everything of this engine runs on."""
        return self._stream

    def start(self, tiles: NDArray[np.uint8]) -> Any:
        """Copy the tiles to the GPU and run them there; returns before that has happened."""
        return self.run(self.upload(tiles))

    def upload(self, tiles: NDArray[np.uint8]) -> Any:
        """The tiles on the GPU: a copy that the engine's stream makes; returns before it has."""
        import torch

        on_host = torch.from_numpy(np.ascontiguousarray(tiles)).pin_memory()
        # It belongs to the stream: its memory is not reused before the stream is done with it.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return on_host.to(self.device, non_blocking=True)

    def run(self, batch: Any) -> Any:
        """As `start`, of tiles that `upload` brought to the GPU. They may be run again."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            table = torch.empty(
                (len(batch) * self.tokens_per_tile, self.hidden_size),
                dtype=torch.bfloat16,
                device=self.device,
            )
            accepted = (
                self._context.set_input_shape(TILES, tuple(batch.shape))
                and self._context.set_tensor_address(TILES, batch.data_ptr())
                and self._context.set_tensor_address(PROMPT_EMBEDDING_TABLE, table.data_ptr())
                and self._context.execute_async_v3(self._stream.cuda_stream)
            )
        if not accepted:
            raise EngineError(f"TensorRT refused to run {len(batch)} tiles on {self.device}")
        return table

    def wait(self) -> None:
        self._stream.synchronize()
