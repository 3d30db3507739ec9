"""Lazy reader of a Hugging Face checkpoint directory: one tensor at a time from its shards.

A LoRA-trained one (`internvl_triton.lora`) reads like a plain one: names are the plain layout's,
and a weight is merged with its adapter when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the name "bfloat16", which safetensors asks for
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from internvl_triton.checkpoint_layout import Shapes
from internvl_triton.errors import IncompleteCheckpoint, InvalidCheckpoint
from internvl_triton.lora import TOWERS, Stored, merged, stored_names
from internvl_triton.safetensors_file import TensorMap

__all__ = ["Checkpoint", "is_finite"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("BF16", "F16", "F32")  # safetensors' names
# A float whose exponent has all bits set is infinite or no number.
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
}
_CHECKED_AT_ONCE = 2**17  # weights: they stay in the cache between the two passes over them


class Checkpoint:
    """Tensors of `directory`, sharded (index file) or single (`model.safetensors`).

    A tensor is mapped while its array lives, so resident memory is one tensor at a time.
    bfloat16 arrives as `ml_dtypes.bfloat16`.
    """

    def __init__(self, directory: Path) -> None:
        """Raises IncompleteCheckpoint for a missing shard; InvalidCheckpoint for a broken one, and
        for adapters that are not as config.json says."""
        self.directory = Path(directory)
        self._file_of_tensor: dict[str, Path] = {}
        self._maps: dict[Path, TensorMap] = {}
        for shard in self._shards():
            try:
                with safe_open(shard, framework="np") as opened:
                    names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise InvalidCheckpoint(
                    f"{shard.name} is not a complete safetensors file ({error}); download it again"
                ) from error
            self._file_of_tensor.update(dict.fromkeys(names, shard))
            self._maps[shard] = TensorMap(shard)
        try:
            self._stored = stored_names(self._file_of_tensor)
        except ValueError as error:
            raise InvalidCheckpoint(f"{self.directory}: {error}") from error
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Adapters of a tower exist if, and only if, config.json gives their rank."""
        config = self.directory / "config.json"
        if not config.is_file():
            return
        ranks = json.loads(config.read_text(encoding="utf-8"))
        for prefix, key in TOWERS.items():
            rank = ranks.get(key, 0)
            adapted = [
                (name, stored)
                for name, stored in self._stored.items()
                if stored.lora_a and name.startswith(prefix)
            ]
            if bool(rank) != bool(adapted):
                raise InvalidCheckpoint(
                    f"config.json has {key}={rank}, and the files hold {len(adapted)} LoRA "
                    f"adapters of {prefix}*; set {key} to the rank of the adapters, or to 0 if "
                    "they are merged already"
                )
            for name, stored in adapted:
                self._check_adapter(name, stored, rank)

    def _check_adapter(self, name: str, stored: Stored, rank: int) -> None:
        assert stored.lora_a is not None
        assert stored.lora_b is not None
        out, columns = self._shape(stored.base)
        expected = {stored.lora_a: (rank, columns), stored.lora_b: (out, rank)}
        for adapter, shape in expected.items():
            if self._shape(adapter) != shape:
                raise InvalidCheckpoint(
                    f"{adapter} has shape {self._shape(adapter)}; config.json's rank {rank} and "
                    f"{name} imply {shape}"
                )

    def _shape(self, stored_name: str) -> tuple[int, ...]:
        with safe_open(self._file_of_tensor[stored_name], framework="np") as opened:
            return tuple(opened.get_slice(stored_name).get_shape())

    def _shards(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = sorted(set(weight_map.values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InvalidCheckpoint(f"{_INDEX} has no readable weight_map") from error
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise IncompleteCheckpoint(
                    f"{self.directory} lacks {len(missing)} of {len(names)} shards named in "
                    f"{_INDEX}: {_some(missing)}"
                )
            return [self.directory / name for name in names]
        single = self.directory / _SINGLE
        if single.is_file():
            return [single]
        raise IncompleteCheckpoint(
            f"{self.directory} has neither {_INDEX} nor {_SINGLE}; "
            "only safetensors checkpoints can be converted"
        )

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def check(self, expected: Shapes) -> None:
        """Compare names, shapes and dtypes of the towers in `expected`; other towers are ignored.

        Raises IncompleteCheckpoint naming missing tensors; InvalidCheckpoint naming weights that
        config.json does not know, a wrong shape, or a dtype that is not a model's (quantised ones).
        """
        missing = [name for name in expected if name not in self._stored]
        if missing:
            raise IncompleteCheckpoint(
                f"{self.directory} lacks {len(missing)} of {len(expected)} tensors: "
                f"{_some(missing)}"
            )
        if unknown := self._unknown(expected):
            raise InvalidCheckpoint(
                f"{self.directory} has {len(unknown)} weights of which config.json knows nothing, "
                f"so it describes another model: {_some(unknown)}"
            )
        by_shard: dict[Path, list[str]] = {}
        for name in expected:
            by_shard.setdefault(self._file(name), []).append(name)
        for shard, names in by_shard.items():
            with safe_open(shard, framework="np") as opened:
                for name in names:
                    stored = opened.get_slice(self._stored[name].base)
                    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                    if shape != expected[name]:
                        raise InvalidCheckpoint(
                            f"{name} has shape {shape}; config.json implies {expected[name]}"
                        )
                    if dtype not in _DTYPES:
                        raise InvalidCheckpoint(
                            f"{name} is stored as {dtype}; supported: {', '.join(_DTYPES)}, "
                            "which an unquantised checkpoint has"
                        )

    def _unknown(self, expected: Shapes) -> list[str]:
        """Weights of the same towers that `expected` lacks.

        Buffers such as inv_freq are no weights. Vision layers behind the last expected one are
        left out on purpose, by select_layer.
        """
        towers = {name.split(".")[0] for name in expected}
        layers = {_vision_layer(name) for name in expected}
        return [
            name
            for name in self._stored
            if name not in expected
            and name.split(".")[0] in towers
            and name.endswith((".weight", ".bias", ".ls1", ".ls2"))
            and _vision_layer(name) in layers
        ]

    def dtype(self, name: str) -> str:
        """safetensors' dtype name: "BF16", "F16", "F32", ..."""
        with safe_open(self._file(name), framework="np") as opened:
            return str(opened.get_slice(self._stored[name].base).get_dtype())

    def shard(self, name: str) -> str:
        """Name of the file that holds the tensor. Raises IncompleteCheckpoint."""
        return self._file(name).name

    def read(self, name: str) -> NDArray[Any]:
        """The whole tensor as it is stored, read-only.

        Raises IncompleteCheckpoint; InvalidCheckpoint where a weight is infinite or not a number.
        """
        self._file(name)  # is there one
        stored = self._stored[name]
        tensor = self._read(stored.base)
        if stored.lora_a is not None and stored.lora_b is not None:
            tensor = merged(tensor, self._read(stored.lora_a), self._read(stored.lora_b))
        if not is_finite(tensor):
            raise InvalidCheckpoint(
                f"{self.shard(name)}: {name} holds weights that are infinite or not a number, so "
                "every answer would be nonsense; fetch the file again, or go back to a checkpoint "
                "from before its training diverged"
            )
        return tensor

    def _read(self, stored_name: str) -> NDArray[Any]:
        return self._maps[self._file_of_tensor[stored_name]].read(stored_name)

    def _file(self, name: str) -> Path:
        try:
            return self._file_of_tensor[self._stored[name].base]
        except KeyError:
            raise IncompleteCheckpoint(f"{self.directory} has no tensor {name!r}") from None


def is_finite(tensor: NDArray[Any]) -> bool:
    """Whether all values are numbers. numpy's own `isfinite` takes ten times as long for bfloat16;
    a model of 50 GB is read in minutes."""
    exponent = _EXPONENTS.get(tensor.dtype.name)
    if exponent is None:
        return True
    bits = tensor.reshape(-1).view(exponent.dtype)
    return all(
        (bits[begin : begin + _CHECKED_AT_ONCE] & exponent).max() < exponent
        for begin in range(0, len(bits), _CHECKED_AT_ONCE)
    )


def _vision_layer(name: str) -> str:
    """ "vision_model.encoder.layers.3." of a name in that layer, "" of any other."""
    found = re.match(r"vision_model\.encoder\.layers\.\d+\.", name)
    return found[0] if found else ""


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
