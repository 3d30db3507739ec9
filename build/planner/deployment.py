"""What is planned: one model on GPUs of one kind."""

from __future__ import annotations

from dataclasses import dataclass

from build.planner.gpus import GpuModel
from build.planner.memory import MemoryPlan, memory_plan
from build.planner.precisions import (
    Precision,
    check_splits,
    checked_kv_cache,
    checked_precision,
    possible_precisions,
    unfit_weight,
)
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["Deployment"]


@dataclass(frozen=True)
class Deployment:
    """One model on tp_size GPUs of one kind."""

    spec: ModelSpec
    limits: Limits
    gpu: GpuModel
    tp_size: int
    precision: Precision
    kv_cache: str

    @classmethod
    def checked(
        cls,
        spec: ModelSpec,
        *,
        limits: Limits,
        gpu: GpuModel,
        tp_size: int,
        precision: str,
        kv_cache: str,
    ) -> Deployment:
        """Raises InvalidTensorParallel, or BuildFailed when the GPU cannot do the precision."""
        spec.llm.check_tp_size(tp_size)
        chosen = checked_precision(precision, gpu)
        check_splits(spec.llm, chosen, tp_size, gpu)
        return cls(spec, limits, gpu, tp_size, chosen, checked_kv_cache(kv_cache, gpu))

    @property
    def fits(self) -> bool:
        """Whether the GPU can do it, the weights can be split, and the memory holds it."""
        return (
            self.precision.name in possible_precisions(self.gpu)
            and (self.kv_cache != "fp8" or self.gpu.fp8_flops is not None)
            and unfit_weight(self.spec.llm, self.precision, self.tp_size) is None
            and self.memory().fits
        )

    def memory(self) -> MemoryPlan:
        return memory_plan(
            self.spec,
            limits=self.limits,
            gpu=self.gpu,
            tp_size=self.tp_size,
            precision=self.precision,
            kv_cache=self.kv_cache,
        )
