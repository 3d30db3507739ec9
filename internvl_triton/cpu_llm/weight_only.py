"""Weight-only quantisation, done when a checkpoint is loaded, as TensorRT-LLM 0.21 does it.

A checkpoint with `quant_algo` W8A16 or W4A16 holds ordinary 16-bit weights. `from_checkpoint`
(`tensorrt_llm/models/modeling_utils.py`: `preprocess_weights`) quantises them rank by rank through
`weight_only_quantize_dict` (`models/convert_utils.py`); the arithmetic is `symmetric_quantize`
(`cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp`). There is one scale per
output of a rank's matrix and no groups. NVIDIA then reorders the integers for the GPU's kernels,
which changes no value; here they stay in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "QuantizedWeight", "Weight", "is_quantized", "linear", "quantize"]

Array = NDArray[np.float32]

BITS = {"W8A16": 8, "W4A16": 4}  # quant_algo in config.json -> bits of a weight
_QUANTIZED = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (out, in) of integers, one scale per output: weight = integer * scale.

    values: int8 (out, in); with 4 bits int8 (out, in / 2), the even input in the low half of a
    byte and the odd one in the high half, both in two's complement.
    scales: float32 (out,).
    """

    values: NDArray[np.int8]
    scales: Array
    bits: int

    def integers(self) -> Array:
        """float32 (out, in): -128 to 127, or -8 to 7."""
        if self.bits == 8:
            return self.values.astype(np.float32)
        integers = np.empty((len(self.values), 2 * self.values.shape[1]), np.float32)
        integers[:, 0::2] = np.left_shift(self.values, 4) >> 4  # the shift back extends the sign
        integers[:, 1::2] = self.values >> 4
        return integers

    def dequantized(self) -> Array:
        """float32 (out, in)."""
        return self.integers() * self.scales[:, None]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


Weight = Array | QuantizedWeight


def is_quantized(name: str) -> bool:
    """Whether tensor `name` of a rank is quantised: the layers' matrices.

    Embedding, lm_head, norms and biases are not (`weight_only_quantize_dict`, `quantize_layers`).
    """
    return name.endswith(_QUANTIZED)


def quantize(weight: NDArray[Any], bits: int) -> QuantizedWeight:
    """(out, in) in any float dtype -> integers of `bits` bits (8 or 4; 4 needs an even `in`).

    scale = max|row| / 2^(bits-1); integer = round(weight / scale), halves away from zero, cut to
    what `bits` bits hold: the largest positive weight of a row becomes 127 or 7, not 128 or 8.
    The scale is kept in the dtype of the weight, rounded after the division used it.
    """
    assert bits in BITS.values(), bits
    limit = 1 << (bits - 1)
    floats = weight.astype(np.float32)
    scales = np.abs(floats).max(axis=1) / np.float32(limit)
    floats /= np.where(scales == 0, np.float32(1), scales)[:, None]
    integers = np.clip(_round_half_away(floats), -limit, limit - 1).astype(np.int8)
    if bits == 4:
        assert weight.shape[1] % 2 == 0, weight.shape
        integers = (integers[:, 0::2] & 0x0F) | np.left_shift(integers[:, 1::2], 4)
    return QuantizedWeight(integers, scales.astype(weight.dtype).astype(np.float32), bits)


def linear(x: Array, weight: Weight) -> Array:
    """x (rows, in) times a matrix (out, in) -> (rows, out), in float32.

    Integers are exact in float32; they are unpacked for this product and dropped again.
    """
    if isinstance(weight, QuantizedWeight):
        product: Array = (x @ weight.integers().T) * weight.scales
        return product
    return x @ weight.T


def _round_half_away(x: Array) -> Array:
    """C's `round`; numpy's rounds halves to even."""
    whole = np.trunc(x)
    rounded: Array = whole + np.where(np.abs(x - whole) >= 0.5, np.copysign(np.float32(1), x), 0)
    return rounded
