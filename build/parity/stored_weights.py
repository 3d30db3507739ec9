"""The weights that a converted language model computes with, from the checkpoint's own.

Transcribed from TensorRT-LLM 0.21, apart from the code that is verified: `symmetric_quantize`
(`cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp`) gives every row of a rank's
matrix one scale, max|row| / 2^(bits-1), rounds halves away from zero, and keeps the scale in the
weights' dtype. A matrix whose inputs are divided among ranks has scales of its own on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvl_triton.errors import BuildFailed

if TYPE_CHECKING:
    import torch

    from build.parity.port import Weights

__all__ = ["stored_weights"]

BITS = {"int8": 8, "int4": 4}
_TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PREFIX = "language_model."
_INPUTS_DIVIDED = (
    *("o_proj.weight", "down_proj.weight"),
    *("attention.wo.weight", "feed_forward.w2.weight"),
)
_OUTPUTS_DIVIDED = (
    *("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"),
    *("attention.wqkv.weight", "feed_forward.w1.weight", "feed_forward.w3.weight"),
)


def stored_weights(precision: str, *, stored: str, tp_size: int) -> Weights:
    """What the reference computes with to be compared with `precision` on `tp_size` ranks.

    precision: bf16, fp16 or fp32, which round, or int8 or int4, which quantise as well.
    stored: of the tensors in the files, "bf16", "fp16" or "fp32". The vision tower is not touched.

    Raises BuildFailed for another precision.
    """
    if precision not in (*_TORCH_DTYPES, *BITS):
        raise BuildFailed(
            f"precision {precision!r} cannot be verified: calibration changes what the model "
            "computes, so no limit tells right from wrong. What can be verified: "
            f"{', '.join((*_TORCH_DTYPES, *BITS))}. What calibration costs is measured by asking "
            "both services the same questions: make accuracy SERVER=... OUTPUT=... COMPARE=..."
        )
    bits = BITS.get(precision)

    def weights(name: str, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if not name.startswith(_PREFIX):
            return tensor.float()
        tensor = tensor.to(getattr(torch, _TORCH_DTYPES[stored]))
        if bits is not None and name.endswith(_OUTPUTS_DIVIDED):
            return quantise_and_dequantise(tensor, bits)
        if bits is not None and name.endswith(_INPUTS_DIVIDED):
            parts = tensor.chunk(tp_size, dim=1)
            return torch.cat([quantise_and_dequantise(part, bits) for part in parts], dim=1)
        return tensor.float()

    return weights


def quantise_and_dequantise(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, in) in the dtype it is stored in -> float32 (out, in)."""
    limit = 2 ** (bits - 1)
    scale = matrix.float().abs().amax(dim=1, keepdim=True) / limit
    quotient = matrix.float() / scale.where(scale > 0, scale.new_ones(()))
    integers = (quotient.sign() * (quotient.abs() + 0.5).floor()).clamp(-limit, limit - 1)
    dequantised: torch.Tensor = integers * scale.to(matrix.dtype).float()
    return dequantised
