"""Which PRECISION and KV_CACHE a GPU, a model and a number of ranks can have.

Sources: TensorRT-LLM 0.21 `docs/source/reference/precision.md` (GPU generations),
`tensorrt_llm/builder.py` (no weight-only, SmoothQuant or int8 KV cache on SM 100 to 119),
`quantization/layers.py` (AWQ: groups of 128 inputs, 64 outputs), and ModelOpt 0.31
`torch/export/postprocess.py`, `check_weight_shape_valid` (groups within a rank).
"""

from __future__ import annotations

from build.planner.precisions import PRECISIONS, unfit_weight
from export import CALIBRATED, stored_precision
from internvl_triton.errors import BuildFailed, InvalidTensorParallel
from internvl_triton.model_spec import ModelSpec

__all__ = ["KV_CACHES", "check_cpu_choice", "check_gpu_choice", "needs_calibration"]

KV_CACHES = ("fp8", "int8")
_FP8_FROM = 8.9  # Ada; Hopper is 9.0
_BLACKWELL = range(100, 120)  # SM numbers
_NOT_ON_BLACKWELL = ("int8", "int4", "int8_sq")


def needs_calibration(precision: str, kv_cache: str | None) -> bool:
    return precision in CALIBRATED or kv_cache is not None


def check_cpu_choice(precision: str, kv_cache: str | None) -> None:
    """Raises BuildFailed for what only the gpu profile has."""
    if not needs_calibration(precision, kv_cache):
        return
    what = f"PRECISION={precision}" if precision in CALIBRATED else f"KV_CACHE={kv_cache}"
    raise BuildFailed(
        f"{what} is calibrated and executed by NVIDIA's programs on a GPU: use PROFILE=gpu. "
        "PROFILE=cpu has PRECISION=bf16, fp16, fp32, int8 or int4, without KV_CACHE"
    )


def check_gpu_choice(
    spec: ModelSpec,
    *,
    precision: str,
    kv_cache: str | None,
    tp_size: int,
    gpu: str,
    compute_capability: str,
) -> None:
    """Pass if the engines of this model can be built so. `precision` 16-bit or quantised.

    gpu: its name, for messages. compute_capability: such as "8.0".
    Raises BuildFailed with what is possible; InvalidTensorParallel if another tp_size is.
    """
    if precision not in (*PRECISIONS, "fp32"):
        raise BuildFailed(f"PRECISION={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        raise BuildFailed(f"KV_CACHE={kv_cache!r} is unknown; use fp8 or int8, or leave it out")
    if stored_precision(precision, spec.dtype) == "fp32":
        raise BuildFailed(
            "TensorRT-LLM's attention kernels know no fp32, so the gpu profile cannot use "
            f"precision {precision!r} of this checkpoint; use PRECISION=bf16 or fp16"
        )
    where = f"{gpu} has compute capability {compute_capability}"
    possible = _precisions_of(compute_capability)
    if precision not in possible:
        raise BuildFailed(
            f"PRECISION={precision} is not for this GPU ({where}; {_needs(precision)}); use "
            f"PRECISION={', '.join(possible)}"
        )
    caches = _kv_caches_of(compute_capability, precision)
    if kv_cache is not None and kv_cache not in caches:
        instead = " or ".join([*(f"KV_CACHE={name}" for name in caches), "no KV_CACHE"])
        why = (
            "int8 keys and values are not for fp8 weights"
            if kv_cache == "int8" and precision == "fp8"
            else f"not for this GPU: {where}; {_needs(kv_cache)}"
        )
        raise BuildFailed(f"KV_CACHE={kv_cache} with PRECISION={precision}: {why}; use {instead}")
    _check_splits(spec, precision, tp_size, possible)


def _precisions_of(compute_capability: str) -> list[str]:
    blackwell = _sm(compute_capability) in _BLACKWELL
    return [
        name
        for name in PRECISIONS
        if (name != "fp8" or float(compute_capability) >= _FP8_FROM)
        and not (blackwell and name in _NOT_ON_BLACKWELL)
    ]


def _kv_caches_of(compute_capability: str, precision: str) -> list[str]:
    caches = []
    if float(compute_capability) >= _FP8_FROM:
        caches.append("fp8")
    if _sm(compute_capability) not in _BLACKWELL and precision != "fp8":
        caches.append("int8")
    return caches


def _sm(compute_capability: str) -> int:
    major, minor = compute_capability.split(".")
    return 10 * int(major) + int(minor)


def _needs(name: str) -> str:
    return "fp8 needs 8.9 or more" if name == "fp8" else "TensorRT-LLM 0.21 has it below 10.0"


def _check_splits(spec: ModelSpec, precision: str, tp_size: int, possible: list[str]) -> None:
    quantised = PRECISIONS[precision]
    unfit = unfit_weight(spec.llm, quantised, tp_size)
    if unfit is None:
        return
    rows_of, columns_of = quantised.multiples
    what = (
        f"PRECISION={precision} needs matrices with multiples of {rows_of} rows and {columns_of} "
        f"columns; with TP={tp_size} {unfit}"
    )
    others = [
        name for name in possible if unfit_weight(spec.llm, PRECISIONS[name], tp_size) is None
    ]
    sizes = [tp for tp in spec.llm.valid_tp_sizes if unfit_weight(spec.llm, quantised, tp) is None]
    if not sizes:
        raise BuildFailed(f"{what}; use PRECISION={', '.join(others)}")
    raise InvalidTensorParallel(
        f"{what}; use TP = {', '.join(map(str, sizes))}, or PRECISION={', '.join(others)}"
    )
