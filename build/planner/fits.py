"""Does it fit? `make engines` asks before it builds anything."""

from __future__ import annotations

from build.planner.deployment import Deployment
from build.planner.gpus import gpu_of_device, named_gpu
from build.planner.ways_out import gib, what_would_fit
from internvl_triton.errors import BuildFailed
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["check_fits", "refusal"]


def check_fits(
    spec: ModelSpec,
    *,
    limits: Limits,
    gpu: str,
    tp_size: int,
    precision: str = "bf16",
    kv_cache: str = "auto",
) -> str:
    """One sentence for the user: how full the GPUs will be.

    gpu: as nvidia-smi calls it, or one of `GPUS`. Of a GPU that is not among them nothing is
    known, so nothing is checked, and the sentence says so.

    Raises BuildFailed, with what would fit, when it does not fit or the GPU cannot do the
    precision; InvalidTensorParallel.
    """
    known = gpu_of_device(gpu)
    if known is None:
        try:
            known = named_gpu(gpu)
        except BuildFailed:
            return f"The planner does not know {gpu}: whether the model fits was not checked."
    deployment = Deployment.checked(
        spec, limits=limits, gpu=known, tp_size=tp_size, precision=precision, kv_cache=kv_cache
    )
    memory = deployment.memory()
    if not memory.fits:
        raise BuildFailed(refusal(deployment))
    return (
        f"Estimated memory: {gib(memory.total_bytes)} of the {gib(memory.available_bytes)} of "
        f"each {known.name}."
    )


def refusal(deployment: Deployment) -> str:
    """Why it does not fit, and what would: a sentence and a line for every way out."""
    memory = deployment.memory()
    ways = what_would_fit(deployment)
    gpu = deployment.gpu
    return "\n".join(
        [
            f"{deployment.precision.name} with TP={deployment.tp_size} needs about "
            f"{gib(memory.total_bytes)} on each GPU, and {gpu.name} has "
            f"{gib(memory.available_bytes)}. "
            + ("What would fit:" if ways else "No change that was tried makes it fit."),
            *(f"  {way}" for way in ways),
        ]
    )
