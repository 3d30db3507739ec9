"""Artefacts -> the Triton model repository that serves them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.triton_config import Deployment, render_repository

__all__ = ["SOURCE", "assemble_repository", "deployment_of"]

SOURCE = Path(__file__).resolve().parent.parent / "model_repository"


def deployment_of(artifacts: Artifacts, llm: LLMBuild) -> Deployment:
    """What the configs in `artifacts`/repository say."""
    return Deployment(
        spec=artifacts.spec(),
        limits=artifacts.limits(),
        model=artifacts.name,
        artifacts_dir="../..",
        llm_checkpoint=str(artifacts.llm_checkpoint(llm).relative_to(artifacts.root)),
    )


def assemble_repository(artifacts: Artifacts, llm: LLMBuild) -> Path:
    """Write `artifacts`/repository: rendered configs and copies of the committed model.py files.

    The old one is replaced in one step.
    """
    target = artifacts.repository
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, text in render_repository(deployment_of(artifacts, llm)).items():
        version = temporary / name / "1"
        version.mkdir(parents=True)
        (temporary / name / "config.pbtxt").write_text(text, encoding="utf-8")
        if name != contract.ENSEMBLE.name:
            shutil.copyfile(SOURCE / name / "1" / "model.py", version / "model.py")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target
