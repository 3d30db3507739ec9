"""Run the vision graph on the CPU: the engine of the `cpu` profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import ArtifactMismatch, InvalidRequest

__all__ = [
    "PROMPT_EMBEDDING_TABLE",
    "TILES",
    "TO_COMPUTE",
    "TO_FLOAT",
    "Features",
    "OnnxVisionEngine",
    "VisionEngine",
    "check_tiles",
]

TILES = "tiles"  # the graph's input
PROMPT_EMBEDDING_TABLE = "prompt_embedding_table"  # the graph's output
TO_COMPUTE = "/to_compute"  # ends the name of a Cast to the type that an engine computes in
TO_FLOAT = "/to_float"  # ends the name of a Cast to float32, whatever the engine computes in


class Features(Protocol):
    """Visual features, rows of one tile after another: a numpy array or a GPU tensor."""

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...

    def __len__(self) -> int: ...


F = TypeVar("F", bound=Features)


class VisionEngine(Protocol[F]):
    """What turns tiles into visual features of type F."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def tokens_per_tile(self) -> int: ...

    @property
    def tile_size(self) -> int: ...

    def encode(self, tiles: NDArray[np.uint8]) -> F:
        """uint8 (num_tiles >= 1, tile_size, tile_size, 3) -> (num_tiles * tokens_per_tile,
        hidden_size)."""
        ...

    def concatenate(self, parts: Sequence[F]) -> F:
        """Rows of all parts in memory of their own, also for a single part."""
        ...

    def zeros(self, num_rows: int) -> F:
        """(num_rows, hidden_size) of zeros."""
        ...


def check_tiles(tiles: NDArray[np.uint8], tile_size: int) -> None:
    """Raise InvalidRequest unless tiles are uint8 (num_tiles >= 1, tile_size, tile_size, 3)."""
    expected = (tile_size, tile_size, 3)
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1:] != expected:
        raise InvalidRequest(
            f"tiles are {tiles.dtype} {list(tiles.shape)}; "
            f"the vision engine takes uint8 [num_tiles, {tile_size}, {tile_size}, 3]"
        )
    if not len(tiles):
        raise InvalidRequest("tiles hold no tile; the vision engine needs at least 1")


class OnnxVisionEngine:
    """`vision_encoder.onnx` in ONNX Runtime, float32.

    threads: cores to use; None means all.
    max_tiles_per_run: tiles that share the memory of one run; attention needs about
    2 * heads * 1025^2 * 4 bytes for each (0.13 GB in the 300M tower, 0.21 GB in the 6B one).
    """

    def __init__(
        self, onnx_path: Path, *, threads: int | None = None, max_tiles_per_run: int = 4
    ) -> None:
        """Raises ArtifactMismatch when the files are missing or are not this project's graph."""
        import onnxruntime as ort

        assert max_tiles_per_run >= 1, max_tiles_per_run
        path = Path(onnx_path)
        for part in (path, path.with_name(path.name + ".data")):
            if not part.is_file():
                raise ArtifactMismatch(f"{part} is missing; export the vision graph again")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Idle threads of this engine must not burn the cores of the language model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes share no public base
            raise ArtifactMismatch(
                f"ONNX Runtime cannot load {path} ({error}); export the vision graph again"
            ) from error
        metadata = session.get_modelmeta().custom_metadata_map
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if (
            [value.name for value in inputs] != [TILES]
            or [value.name for value in outputs] != [PROMPT_EMBEDDING_TABLE]
            or "tokens_per_tile" not in metadata
        ):
            raise ArtifactMismatch(
                f"{path} is not a vision graph of this project; export the vision graph again"
            )
        self._session = session
        self._max_tiles_per_run = max_tiles_per_run
        self.tile_size = int(inputs[0].shape[1])
        self.hidden_size = int(outputs[0].shape[1])
        self.tokens_per_tile = int(metadata["tokens_per_tile"])
        self.dtype = np.dtype(np.float32)

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (num_tiles, 448, 448, 3) -> float32 (num_tiles * tokens_per_tile, hidden_size).

        Raises InvalidRequest for another shape or dtype, or for no tile at all.
        """
        check_tiles(tiles, self.tile_size)
        features = np.empty((len(tiles) * self.tokens_per_tile, self.hidden_size), np.float32)
        step = self._max_tiles_per_run
        for start in range(0, len(tiles), step):
            run = np.ascontiguousarray(tiles[start : start + step])
            (part,) = self._session.run([PROMPT_EMBEDDING_TABLE], {TILES: run})
            first = start * self.tokens_per_tile
            features[first : first + len(part)] = part
        return features

    def concatenate(self, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate(parts)

    def zeros(self, num_rows: int) -> NDArray[np.float32]:
        return np.zeros((num_rows, self.hidden_size), np.float32)
