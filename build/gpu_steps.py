"""The steps of `make engines` that compile for a GPU."""

from __future__ import annotations

from pathlib import Path

from build.fingerprint import key_of, source_digest
from build.gpu_servable import VISION_PLAN_STEP
from build.llm_engine import build_llm_engine
from build.machine import Machine
from build.step import Step
from build.vision_plan import build_vision_plan
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest
from internvl_triton.limits import Limits

__all__ = ["gpu_steps"]

_FOLDER = Path(__file__).resolve().parent


def gpu_steps(
    artifacts: Artifacts,
    manifest: Manifest,
    llm: LLMBuild,
    machine: Machine,
    code: str,
    calibrated: list[Step],
    progress: bool,
) -> list[Step]:
    """Vision plan and language model engine, for the GPUs of `machine`.

    code: digest of the code that made the portable artefacts.
    calibrated: steps that make the language model's checkpoint with the vision plan's features.
    """
    limits = Limits.from_json(manifest.limits)
    made_with = {
        "TensorRT": str(machine.tensorrt),
        "TensorRT-LLM": str(machine.tensorrt_llm),
        "compute capability": machine.gpus[0].compute_capability,
    }
    compiled_from = (manifest.checkpoint_sha256, code, made_with)
    builders = [_FOLDER / f"{name}.py" for name in ("vision_engine", "vision_plan")]
    built_into_llm = (
        limits.max_batch_size,
        limits.max_seq_len,
        limits.max_tiles_per_request,
    )
    return [
        Step(
            VISION_PLAN_STEP,
            key_of(compiled_from, source_digest(builders), limits.max_tiles_per_run),
            artifacts.vision_plan,
            lambda: build_vision_plan(
                artifacts.vision_onnx,
                artifacts.vision_plan,
                limits=limits,
                machine=machine,
                progress=progress,
            ),
            made_with | {"max tiles": str(limits.max_tiles_per_run)},
        ),
        *calibrated,
        Step(
            llm.engine_step,
            key_of(
                compiled_from,
                source_digest([_FOLDER / "llm_engine.py"]),
                built_into_llm,
                llm,
                [step.key for step in calibrated],
            ),
            artifacts.llm_engine(llm) / "config.json",
            lambda: build_llm_engine(
                artifacts.llm_checkpoint(llm),
                artifacts.llm_engine(llm),
                spec=artifacts.spec(),
                limits=limits,
                llm=llm,
            ),
            made_with,
        ),
    ]
