"""How much of a GPU's peak real engines reach: a few constants, the rest is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from build.planner.gpus import GpuModel

__all__ = ["CALIBRATED", "PEAK", "Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Fractions of the data sheet's peaks, and time that no data sheet knows.

    matmul: of the dense tensor core peak, by architecture and compute type.
    bandwidth: of the memory bandwidth, for weights and KV cache.
    link: of the link's bandwidth in all-reduces, by kind of link.
    all_reduce_s: per all-reduce, however small.
    sequence_s: per sequence and step: sampling, scheduling, responses.
    """

    matmul: dict[str, float]
    bandwidth: float
    link: dict[str, float]
    all_reduce_s: float
    sequence_s: float

    def matmul_fraction(self, gpu: GpuModel, compute: str) -> float:
        """int8 was not calibrated: it takes fp8's fraction where there is one, else bf16's.
        Ada's bf16 was not either: it takes Ampere's."""
        kind = f"{gpu.architecture} {compute}"
        if compute == "int8":
            kind = f"{gpu.architecture} {'bf16' if gpu.fp8_flops is None else 'fp8'}"
        return self.matmul.get(kind, self.matmul["ampere bf16"])

    def flops(self, gpu: GpuModel, compute: str) -> float:
        """Operations per second reached in large matrix products."""
        return gpu.peak_flops(compute) * self.matmul_fraction(gpu, compute)


# Nothing lost: what comes out is a floor that no engine can beat.
PEAK = Calibration(
    matmul={"ampere bf16": 1.0, "hopper bf16": 1.0, "hopper fp8": 1.0, "ada fp8": 1.0},
    bandwidth=1.0,
    link={"nvlink": 1.0, "pcie": 1.0},
    all_reduce_s=0.0,
    sequence_s=0.0,
)
# Fitted by `python -m build.planner.fit` on half of published_throughput.json: all of it at full
# batches, so a single request is likely to be faster than this says.
CALIBRATED = Calibration(
    matmul={"ampere bf16": 0.64, "hopper bf16": 0.69, "hopper fp8": 0.68, "ada fp8": 0.55},
    bandwidth=0.77,
    link={"nvlink": 0.72, "pcie": 0.42},
    all_reduce_s=96e-6,
    sequence_s=10e-6,
)
