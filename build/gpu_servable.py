"""Whether the engines on disk fit this machine, the pinned container and the limits."""

from __future__ import annotations

from build.llm_engine import engine_problem
from build.machine import Machine, mixed_gpus, wrong_container
from build.servable import check_servable
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import ArtifactMismatch

__all__ = ["VISION_PLAN_STEP", "check_gpu_servable"]

VISION_PLAN_STEP = "vision plan"


def check_gpu_servable(artifacts: Artifacts, llm: LLMBuild, machine: Machine) -> None:
    """Raise ArtifactMismatch, one sentence saying what does not fit and what to run."""
    rebuild = f"run: make engines MODEL={artifacts.name} {llm.options} PROFILE=gpu"
    check_servable(artifacts, llm, steps=(VISION_PLAN_STEP, llm.engine_step), rebuild=rebuild)
    if problem := wrong_container(machine) or mixed_gpus(machine):
        raise ArtifactMismatch(problem)
    problem = (
        _compiled_for_another_machine(artifacts, llm, machine)
        or _too_few_gpus(llm, machine)
        or _vision_problem(artifacts)
        or engine_problem(
            artifacts.llm_engine(llm),
            artifacts.llm_checkpoint(llm),
            spec=artifacts.spec(),
            limits=artifacts.limits(),
            llm=llm,
        )
    )
    if problem:
        raise ArtifactMismatch(f"{problem}; {rebuild}")


def _compiled_for_another_machine(
    artifacts: Artifacts, llm: LLMBuild, machine: Machine
) -> str | None:
    steps = artifacts.manifest().steps
    here = {
        "TensorRT": machine.tensorrt,
        "TensorRT-LLM": machine.tensorrt_llm,
        "compute capability": machine.gpus[0].compute_capability,
    }
    for step in (VISION_PLAN_STEP, llm.engine_step):
        for what, found in here.items():
            built = steps[step].get(what)
            if built != found:
                return f"step {step!r} was built with {what} {built}, and this machine has {found}"
    return None


def _too_few_gpus(llm: LLMBuild, machine: Machine) -> str | None:
    found = len(machine.gpus)
    if found >= llm.tp_size:
        return None
    return (
        f"TP={llm.tp_size} needs {llm.tp_size} GPUs, and {found} can be seen here; give it more "
        f"GPUs (CUDA_VISIBLE_DEVICES), or build for TP={found} or less"
    )


def _vision_problem(artifacts: Artifacts) -> str | None:
    if not artifacts.vision_plan.is_file():
        return f"{artifacts.vision_plan} is missing"
    built = artifacts.manifest().steps[VISION_PLAN_STEP].get("max tiles")
    wanted = artifacts.limits().max_tiles_per_run
    if built == str(wanted):
        return None
    return f"the vision engine was built for {built} tiles a run, and the limits say {wanted}"
