"""What a conversion needs of safetensors files beyond the library of that name.

Writing a file whose tensors arrive one by one, in pieces, in any order: the library writes a file
from tensors that are all in memory. Reading a tensor without a copy: the library's is fresh memory,
which takes the kernel longer to give than the bytes take to write.
Format: 8-byte little-endian header length, JSON header, raw little-endian data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEM_SIZE", "Layout", "SafetensorsWriter", "TensorMap", "num_bytes", "numpy_dtype"]

ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4, "I64": 8}

_NUMPY_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_MADV_POPULATE_READ = 22  # Linux's; the mmap module of Python 3.10 to 3.12 has no name for it

_PAGE_BYTES = 4096
_COPY_BYTES = 2**20  # stays in a core's own cache

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype name, shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of one that safetensors calls `name`. Raises TypeError for one it has not."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

    return np.dtype(_NUMPY_NAMES.get(name, name))


def num_bytes(layout: Layout) -> int:
    """Size of the tensors of one file."""
    return sum(math.prod(shape) * ITEM_SIZE[dtype] for dtype, shape in layout.values())


def _page_aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Memory that begins with a page."""
    raw = np.empty(num_bytes + _PAGE_BYTES, np.uint8)
    begin = -raw.ctypes.data % _PAGE_BYTES
    return raw[begin : begin + num_bytes]


class TensorMap:
    """The tensors of one file that `safetensors.safe_open` has opened without complaint."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            self._header: dict[str, Any] = json.loads(file.read(size))
        self._begin = 8 + size

    def read(self, name: str) -> NDArray[Any]:
        """The whole tensor, mapped read-only for as long as the array lives.

        Raises KeyError when there is no such tensor; TypeError when numpy has no such dtype.
        """
        entry = self._header[name]
        dtype = numpy_dtype(entry["dtype"])
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        if begin == end:
            return np.empty(entry["shape"], dtype)
        left = begin % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            pages = mmap.mmap(
                file.fileno(), end - begin + left, offset=begin - left, access=mmap.ACCESS_READ
            )
        with contextlib.suppress(OSError):  # before Linux 5.14 the pages come one by one
            pages.madvise(_MADV_POPULATE_READ)
        array: NDArray[Any] = np.frombuffer(pages, dtype, offset=left).reshape(entry["shape"])
        return array


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
        self._buffer = _page_aligned(_COPY_BYTES + _PAGE_BYTES)

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._tmp.open("wb")
        self._file.write(self._preamble)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.truncate(self._size)
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
        begin = len(self._preamble) + self._begin[name] + first_row * row_bytes
        self._file.seek(begin)
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        # Through a buffer that lies in memory as the bytes will in the file's pages: the kernel
        # copies bytes that lie otherwise several times more slowly.
        at = 0
        while at < len(data):
            left = (begin + at) % _PAGE_BYTES
            part = data[at : at + _COPY_BYTES]
            aligned = self._buffer[left : left + len(part)]
            aligned[:] = part
            self._file.write(aligned.data)
            at += len(part)
