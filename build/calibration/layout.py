"""Tensors of a calibrated TensorRT-LLM 0.21 checkpoint, as ModelOpt 0.31 exports them.

Names: `tensorrt_llm/quantization/layers.py` and, for the KV cache, `layers/attention.py` of
TensorRT-LLM 0.21. Shapes and splits over ranks: ModelOpt 0.31 `torch/export/postprocess.py`,
`_split_model_config_for_tp`. Of a linear (out, in):

int4_awq  weight int8 (out / 2, in): two outputs a byte; weights_scaling_factor (out, in / 128);
          prequant_scaling_factor (in,)
fp8       weight fp8 e4m3 (out, in); weights_scaling_factor, activation_scaling_factor (1,)
int8_sq   weight int8 (out, in); weights_scaling_factor (out,); activation_scaling_factor (1,);
          prequant_scaling_factor (in,)
"""

from __future__ import annotations

from collections.abc import Mapping

from internvl_triton.checkpoint_layout import Shapes
from internvl_triton.cpu_llm.rank_layout import rank_shapes
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import LLMSpec

__all__ = ["GROUP_SIZE", "LAYERS", "calibrated_shapes", "check_layers"]

GROUP_SIZE = 128
LAYERS = "transformer.layers."
WEIGHT_DTYPES = {"int4_awq": "int8", "int8_sq": "int8", "fp8": "float8_e4m3fn"}


def calibrated_shapes(
    spec: LLMSpec, *, precision: str, kv_cache: str | None, tp_size: int
) -> Shapes:
    """Layer tensors of one rank; all ranks have the same shapes."""
    shapes: Shapes = {}
    for name, shape in rank_shapes(spec, tp_size).items():
        if not name.startswith(LAYERS):
            continue
        if len(shape) == 2 and precision in WEIGHT_DTYPES:
            shapes.update(_linear(name.removesuffix("weight"), *shape, precision))
        else:
            shapes[name] = shape
        if kv_cache is not None and name.endswith("attention.dense.weight"):
            attention = name.removesuffix("dense.weight")
            shapes[f"{attention}kv_cache_scaling_factor"] = (1,)
    return shapes


def _linear(prefix: str, rows: int, columns: int, precision: str) -> Shapes:
    if precision == "int4_awq":
        return {
            f"{prefix}weight": (rows // 2, columns),
            f"{prefix}weights_scaling_factor": (rows, columns // GROUP_SIZE),
            f"{prefix}prequant_scaling_factor": (columns,),
        }
    if precision == "fp8":
        return {
            f"{prefix}weight": (rows, columns),
            f"{prefix}weights_scaling_factor": (1,),
            f"{prefix}activation_scaling_factor": (1,),
        }
    assert precision == "int8_sq", precision
    return {
        f"{prefix}weight": (rows, columns),
        f"{prefix}weights_scaling_factor": (rows,),
        f"{prefix}activation_scaling_factor": (1,),
        f"{prefix}prequant_scaling_factor": (columns,),
    }


def check_layers(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    spec: LLMSpec,
    *,
    precision: str,
    kv_cache: str | None,
    tp_size: int,
) -> None:
    """Pass if `found`, name -> (dtype, shape) of a rank's layer tensors, is what 0.21 loads.

    Factors of the k and v cache of their own are allowed: 0.21 does not read them.
    Raises BuildFailed naming the first difference.
    """
    expected = calibrated_shapes(spec, precision=precision, kv_cache=kv_cache, tp_size=tp_size)
    extra = {
        name
        for name in found
        if kv_cache is None
        or not name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))
    } - set(expected)
    if missing := sorted(set(expected) - set(found)):
        raise BuildFailed(f"ModelOpt exported no {missing[0]} ({len(missing)} are missing)")
    if extra:
        raise BuildFailed(f"ModelOpt exported {min(extra)}, which {precision} has not")
    for name, shape in expected.items():
        dtype, its_shape = found[name]
        if its_shape != shape:
            raise BuildFailed(
                f"ModelOpt exported {name} as {its_shape}; TensorRT-LLM reads {shape}"
            )
        wanted = WEIGHT_DTYPES.get(precision)
        is_linear = name.endswith(".weight") and len(shape) == 2
        if is_linear and wanted is not None and dtype != wanted:
            raise BuildFailed(f"ModelOpt exported {name} as {dtype}; {precision} has {wanted}")
