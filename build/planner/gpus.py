"""The GPUs that can be planned for: what NVIDIA's data sheets say about them.

Peaks are dense (no sparsity), with fp32 accumulation where the data sheet tells them apart.
`memory_bytes` is what CUDA offers to programs, below the number on the box: the total that PyTorch
names in its out-of-memory message on that GPU, rounded down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from internvl_triton.errors import BuildFailed

__all__ = ["GPUS", "GpuModel", "gpu_of_device", "named_gpu"]

GIB = 2**30


@dataclass(frozen=True)
class GpuModel:
    """One GPU.

    link: to the other GPUs, "nvlink" or "pcie"; link_bytes_per_s: in one direction.
    fp8_flops: None where the tensor cores know no fp8.
    """

    name: str
    architecture: str
    compute_capability: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops: float
    int8_flops: float
    fp8_flops: float | None
    link: str
    link_bytes_per_s: float
    source: str

    def peak_flops(self, compute: str) -> float:
        """Dense operations per second in "bf16" (fp16 is equal), "int8" or "fp8"."""
        peaks = {"bf16": self.bf16_flops, "int8": self.int8_flops, "fp8": self.fp8_flops}
        peak = peaks[compute]
        assert peak is not None, f"{self.name} has no {compute}"
        return peak


# The peaks and bandwidths below are in these units.
T, G = 1e12, 1e9
_NVLINK_3, _NVLINK_4 = ("nvlink", 300 * G), ("nvlink", 450 * G)  # one direction
_PCIE_4 = ("pcie", 32 * G)  # x16, one direction
_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
# fmt: off
_TABLE = (
    # name, architecture, compute capability, memory GiB, bandwidth, bf16, int8, fp8, link, source
    ("A100-40G", "ampere", "8.0", 39.3, 1555*G, 312*T, 624*T, None, _NVLINK_3, _A100),
    ("A100-80G", "ampere", "8.0", 79.1, 2039*G, 312*T, 624*T, None, _NVLINK_3, _A100),
    ("A100-80G-PCIe", "ampere", "8.0", 79.1, 1935*G, 312*T, 624*T, None, _PCIE_4, _A100),
    ("H100-80G", "hopper", "9.0", 79.1, 3350*G, 989.4*T, 1978.9*T, 1978.9*T, _NVLINK_4, _H100),
    ("H200", "hopper", "9.0", 139.7, 4800*G, 989.4*T, 1978.9*T, 1978.9*T, _NVLINK_4,
     "NVIDIA H200 data sheet, SXM; peaks as H100"),
    ("L40S", "ada", "8.9", 44.3, 864*G, 362.05*T, 733*T, 733*T, _PCIE_4, "NVIDIA L40S data sheet"),
    ("A10", "ampere", "8.6", 22.0, 600*G, 125*T, 250*T, None, _PCIE_4, "NVIDIA A10 data sheet"),
    ("L4", "ada", "8.9", 22.0, 300*G, 121*T, 242.5*T, 242.5*T, _PCIE_4,
     "NVIDIA L4 data sheet, halved: it gives sparse peaks"),
    ("RTX-4090", "ada", "8.9", 23.5, 1008*G, 165.2*T, 660.6*T, 330.3*T, _PCIE_4, _ADA),
)
# fmt: on
GPUS: dict[str, GpuModel] = {
    name: GpuModel(
        name, architecture, capability, int(gib * GIB), bandwidth, bf16, int8, fp8, *link, source
    )
    for name, architecture, capability, gib, bandwidth, bf16, int8, fp8, link, source in _TABLE
}
_ALIASES = {"a100": "A100-80G", "h100": "H100-80G"}
# What nvidia-smi calls them. The first that matches counts.
_DEVICES = (
    (r"A100.*PCIe.*80G|A100 80GB PCIe", "A100-80G-PCIe"),
    (r"A100.*80G", "A100-80G"),
    (r"A100.*40G", "A100-40G"),
    (r"H100 80GB HBM3", "H100-80G"),
    (r"H200(?! NVL)", "H200"),
    (r"L40S", "L40S"),
    (r"A10\b", "A10"),
    (r"L4\b", "L4"),
    (r"RTX 4090(?! (D|Laptop))", "RTX-4090"),
)


def named_gpu(name: str) -> GpuModel:
    """The GPU of this name: case, "-", "_", spaces and a final "B" do not matter.

    Raises BuildFailed with the names there are.
    """
    wanted = _plain(name)
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted or _ALIASES.get(wanted) == gpu.name:
            return gpu
    raise BuildFailed(f"GPU={name!r} is unknown; use one of {', '.join(GPUS)}")


def gpu_of_device(device: str) -> GpuModel | None:
    """The GPU that nvidia-smi calls `device` ("NVIDIA A100-SXM4-80GB"), or None."""
    for pattern, name in _DEVICES:
        if re.search(pattern, device):
            return GPUS[name]
    return None


def _plain(name: str) -> str:
    return re.sub(r"(?<=\dg)b", "", re.sub(r"[-_\s]", "", name.lower()))
