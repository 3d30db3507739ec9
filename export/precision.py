"""What PRECISION means for a TensorRT-LLM checkpoint, and which model can have which.

"int8" and "int4" are weight-only (`quant_algo` W8A16, W4A16). Their checkpoints hold the same
16-bit tensors as "bf16" or "fp16" ones and name the quantisation in config.json; whoever loads them
quantises:
- `trtllm-build` 0.21: `PretrainedModel.from_checkpoint` -> `preprocess_weights`
  (`tensorrt_llm/models/modeling_utils.py`) -> `weight_only_quantize_dict`
  (`models/convert_utils.py`), which takes every layer matrix that is not int8 yet;
- the CPU engine: `internvl_triton/cpu_llm/weight_only.py`, with the same arithmetic.
"int4_awq", "fp8" and "int8_sq" are calibrated: `build/calibration/` makes their checkpoints, with
pictures and on a GPU; nothing here does.

Integers in the file would be taken as they are, so they would have to be in the order that the
kernels of one GPU generation want (`preprocess_weights_for_mixed_gemm`): such a file fits no other
GPU, and integers in natural order would give nonsense without an error. The price is that the
checkpoint is as large as an unquantised one; engine and memory are small.
"""

from __future__ import annotations

from internvl_triton.cpu_llm.rank_layout import rank_shapes
from internvl_triton.cpu_llm.weight_only import is_quantized
from internvl_triton.errors import BuildFailed, InvalidTensorParallel
from internvl_triton.model_spec import LLMSpec, ModelSpec

__all__ = [
    "CALIBRATED",
    "DTYPES",
    "PRECISIONS",
    "QUANT_ALGOS",
    "check_precision",
    "stored_precision",
]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # -> dtype in config.json
WEIGHT_ONLY = ("int8", "int4")
CALIBRATED = ("int4_awq", "fp8", "int8_sq")
QUANT_ALGOS = {  # -> quant_algo in config.json
    "int8": "W8A16",
    "int4": "W4A16",
    "int4_awq": "W4A16_AWQ",
    "fp8": "FP8",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
}
PRECISIONS = (*DTYPES, *WEIGHT_ONLY)  # of the converter
# "Our kernels only handle dims which are multiples of 64 for weight-only quantization":
# cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, and WeightOnlyQuantLinear in
# tensorrt_llm/quantization/layers.py, whose parameters have no other shape.
_MULTIPLE = 64


def stored_precision(precision: str | None, torch_dtype: str) -> str:
    """Of the tensors in the files and of activations: "bf16", "fp16" or "fp32".

    precision: a known one, or None. None and quantised ones keep the checkpoint's `torch_dtype`;
    but what stays unquantised in those has 16 bits, so a float32 checkpoint becomes bf16 for them.
    """
    if precision is not None and precision in DTYPES:
        return precision
    if precision in QUANT_ALGOS and torch_dtype == "float32":
        return "bf16"
    return next(name for name, dtype in DTYPES.items() if dtype == torch_dtype)


def check_precision(spec: ModelSpec, precision: str, tp_size: int) -> None:
    """Pass if this model can have `precision` on `tp_size` ranks (a valid tp_size).

    Raises BuildFailed for a precision that is unknown, that needs a GPU to calibrate it, or that
    this model cannot have at all; InvalidTensorParallel if it can at another tp_size.
    """
    if precision in CALIBRATED:
        raise BuildFailed(
            f"precision {precision!r} is calibrated on a GPU, which this converter does not do; "
            f"it writes {', '.join(PRECISIONS)}, of which int8 and int4 need no calibration"
        )
    if precision not in PRECISIONS:
        raise BuildFailed(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    if precision not in WEIGHT_ONLY:
        return
    unfit = _unfit_matrix(spec.llm, tp_size)
    if unfit is None:
        return
    name, (rows, columns) = unfit
    what = (
        f"{precision} needs matrices whose sides are multiples of {_MULTIPLE} (TensorRT-LLM's "
        f"weight-only kernels); on {tp_size} rank(s) {name} is {rows} x {columns}"
    )
    plain = stored_precision(None, spec.dtype)
    fitting = [tp for tp in spec.llm.valid_tp_sizes if _unfit_matrix(spec.llm, tp) is None]
    if not fitting:
        raise BuildFailed(f"{what}, and no other TP fits this model; use precision {plain}")
    sizes = ", ".join(map(str, fitting))
    raise InvalidTensorParallel(f"{what}; use TP = {sizes}, or precision {plain}")


def _unfit_matrix(spec: LLMSpec, tp_size: int) -> tuple[str, tuple[int, ...]] | None:
    """The first matrix of a rank's layer that cannot be quantised, with its (out, in)."""
    for name, shape in rank_shapes(spec, tp_size).items():
        if is_quantized(name) and any(side % _MULTIPLE for side in shape):
            return name.removeprefix("transformer.layers.0."), shape
    return None
