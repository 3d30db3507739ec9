"""Write a safetensors file whose tensors arrive one by one, in pieces, in any order.

The `safetensors` library writes a file from tensors that are all in memory; a conversion that
must not hold a model needs the layout first and the bytes later.
Format: 8-byte little-endian header length, JSON header, raw little-endian data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEM_SIZE", "Layout", "SafetensorsWriter", "num_bytes"]

ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4, "I64": 8}

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype name, shape)


def num_bytes(layout: Layout) -> int:
    """Size of the tensors of one file."""
    return sum(math.prod(shape) * ITEM_SIZE[dtype] for dtype, shape in layout.values())


class SafetensorsWriter:
    """Context manager over `path`, laid out for `tensors`: name -> (dtype name, shape).

    The file appears under its own name only when the block ends without an exception; until
    then it is `path` + ".tmp". Ranges that are never written stay zero (holes in the file).
    """

    def __init__(
        self,
        path: Path,
        tensors: Layout,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._tmp = self.path.with_name(self.path.name + ".tmp")
        self._tensors = dict(tensors)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._begin: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
            self._begin[name] = begin
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._preamble = struct.pack("<Q", len(encoded)) + encoded
        self._size = len(self._preamble) + end

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._tmp.open("wb")
        self._file.write(self._preamble)
        self._file.truncate(self._size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._tmp, self.path)
        else:
            self._tmp.unlink(missing_ok=True)

    def write(self, name: str, array: NDArray[Any], *, first_row: int = 0) -> None:
        """Write `array` as rows first_row, first_row + 1, ... of tensor `name`.

        The trailing dimensions must be the tensor's, the item size its dtype's.
        """
        dtype, shape = self._tensors[name]
        assert array.shape[1:] == shape[1:], (name, array.shape, shape)
        assert first_row + len(array) <= shape[0], (name, first_row, array.shape, shape)
        assert array.dtype.itemsize == ITEM_SIZE[dtype], (name, array.dtype, dtype)
        row_bytes = math.prod(shape[1:]) * ITEM_SIZE[dtype]
        self._file.seek(len(self._preamble) + self._begin[name] + first_row * row_bytes)
        self._file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
