"""What PRECISION and KV_CACHE mean on a GPU, and which of them a GPU can do.

Sources: TensorRT-LLM 0.21 `docs/source/reference/precision.md` (which GPU knows what) and
`tensorrt_llm/quantization/` (which tensors carry scales). Quantised are the five linear weights of
a layer; embedding, lm_head, norms and biases stay 16-bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.planner.gpus import GpuModel
from internvl_triton.cpu_llm.rank_layout import rank_shapes
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import LLMSpec

__all__ = [
    "KV_CACHES",
    "PRECISIONS",
    "Precision",
    "check_splits",
    "checked_kv_cache",
    "checked_precision",
    "possible_precisions",
    "unfit_weight",
]


@dataclass(frozen=True)
class Precision:
    """bits: of one weight. compute: what the tensor cores multiply ("bf16" stands for fp16 too).

    group_size: input channels that share a scale, None for one scale per output channel.
    """

    name: str
    bits: int
    compute: str = "bf16"
    group_size: int | None = None

    @property
    def is_quantised(self) -> bool:
        return self.bits < 16

    @property
    def multiples(self) -> tuple[int, int]:
        """What rows and columns of a linear weight must be multiples of.

        64 for weight-only kernels (`cutlass_preprocessors.cpp`); whole groups of inputs.
        """
        if not self.is_quantised or self.compute != "bf16":
            return 1, 1
        return 64, self.group_size or 64

    def linear_bytes(self, rows: int, columns: int) -> int:
        """One linear weight (out, in) with its scales.

        Weight-only and SmoothQuant: one 16-bit scale per output channel. AWQ: one per group of
        inputs and output channel, and one smoothing factor per input. fp8: two fp32 per tensor.
        """
        weight = rows * columns * self.bits // 8
        if not self.is_quantised:
            return weight
        if self.compute == "fp8":
            return weight + 2 * 4
        if self.group_size is None:
            return weight + rows * 2
        return weight + rows * -(-columns // self.group_size) * 2 + columns * 2


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("bf16", 16),
        Precision("fp16", 16),
        Precision("int8", 8),
        Precision("int4", 4),
        Precision("int4_awq", 4, group_size=128),
        Precision("fp8", 8, compute="fp8"),
        Precision("int8_sq", 8, compute="int8"),
    )
}
KV_CACHES: dict[str, int] = {"auto": 2, "fp8": 1, "int8": 1}  # bytes of one key or value


def checked_precision(name: str, gpu: GpuModel) -> Precision:
    """Raises BuildFailed, with what is possible, when there is no such precision on this GPU."""
    if name not in PRECISIONS:
        raise BuildFailed(f"PRECISION={name!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if PRECISIONS[name].compute == "fp8" and gpu.fp8_flops is None:
        raise BuildFailed(
            f"PRECISION=fp8 needs compute capability 8.9 or 9.0, and {gpu.name} has "
            f"{gpu.compute_capability}; there, use one of {', '.join(possible_precisions(gpu))}"
        )
    return PRECISIONS[name]


def unfit_weight(spec: LLMSpec, precision: Precision, tp_size: int) -> str | None:
    """The first linear weight of a rank that this precision cannot hold, with its (out, in)."""
    rows_of, columns_of = precision.multiples
    for name, shape in rank_shapes(spec, tp_size).items():
        if not name.startswith("transformer.layers.") or len(shape) != 2:
            continue
        rows, columns = shape
        if rows % rows_of or columns % columns_of:
            return f"{name.removeprefix('transformer.layers.0.')} is {rows} x {columns}"
    return None


def check_splits(spec: LLMSpec, precision: Precision, tp_size: int, gpu: GpuModel) -> None:
    """Raises BuildFailed, with the TP that work, when a rank's weights cannot be quantised."""
    unfit = unfit_weight(spec, precision, tp_size)
    if unfit is None:
        return
    rows_of, columns_of = precision.multiples
    sizes = [tp for tp in spec.valid_tp_sizes if unfit_weight(spec, precision, tp) is None]
    others = [
        name
        for name in possible_precisions(gpu)
        if unfit_weight(spec, PRECISIONS[name], tp_size) is None
    ]
    raise BuildFailed(
        f"PRECISION={precision.name} needs weights with multiples of {rows_of} rows and of "
        f"{columns_of} columns, and with TP={tp_size} {unfit}; use "
        + (f"TP = {', '.join(map(str, sizes))}, or " if sizes else "")
        + f"PRECISION {', '.join(others)}"
    )


def possible_precisions(gpu: GpuModel) -> list[str]:
    return [
        precision.name
        for precision in PRECISIONS.values()
        if precision.compute != "fp8" or gpu.fp8_flops is not None
    ]


def checked_kv_cache(name: str, gpu: GpuModel) -> str:
    """Raises BuildFailed, with what is possible, when the GPU has no such KV cache."""
    if name not in KV_CACHES:
        raise BuildFailed(f"KV_CACHE={name!r} is unknown; use one of {', '.join(KV_CACHES)}")
    if name == "fp8" and gpu.fp8_flops is None:
        raise BuildFailed(
            f"KV_CACHE=fp8 needs compute capability 8.9 or 9.0, and {gpu.name} has "
            f"{gpu.compute_capability}; there, use auto or int8"
        )
    return name
