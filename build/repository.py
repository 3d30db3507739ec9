"""Artefacts -> the Triton model repository that serves them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild, Profile
from internvl_triton.gpu_deployment import GpuDeployment
from internvl_triton.guides import xgrammar_tokenizer_info
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.triton_config import Deployment, render_repository

__all__ = ["SOURCE", "assemble_repository", "deployment_of", "gpu_deployment"]

TOKENIZER_INFO = "xgrammar_tokenizer_info.json"
SOURCE = Path(__file__).resolve().parent.parent / "model_repository"


def gpu_deployment(artifacts: Artifacts, llm: LLMBuild) -> GpuDeployment:
    """The engines that were built for `llm`."""
    config = json.loads((artifacts.llm_checkpoint(llm) / "config.json").read_text(encoding="utf-8"))
    engine = artifacts.llm_engine(llm).resolve()
    tokenizer_info = artifacts.repository.resolve() / contract.TENSORRT_LLM.name / TOKENIZER_INFO
    return GpuDeployment(engine, config["dtype"], llm.tp_size, llm.kv_cache, tokenizer_info)


def deployment_of(
    artifacts: Artifacts, llm: LLMBuild, profile: Profile = "cpu", *, postprocessing_batch: int = 1
) -> Deployment:
    """What the configs in `artifacts`/repository say."""
    return Deployment(
        spec=artifacts.spec(),
        limits=artifacts.limits(),
        model=artifacts.name,
        artifacts_dir="../..",
        llm_checkpoint=str(artifacts.llm_checkpoint(llm).relative_to(artifacts.root)),
        postprocessing_batch=postprocessing_batch,
        gpu=gpu_deployment(artifacts, llm) if profile == "gpu" else None,
    )


def assemble_repository(
    artifacts: Artifacts, llm: LLMBuild, profile: Profile = "cpu", *, postprocessing_batch: int = 1
) -> Path:
    """Write `artifacts`/repository: rendered configs and copies of the committed model.py files.

    The old one is replaced in one step.
    """
    without_code = {contract.ENSEMBLE.name}
    if profile == "gpu":
        without_code.add(contract.TENSORRT_LLM.name)  # its backend is NVIDIA's
    target = artifacts.repository
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    deployment = deployment_of(artifacts, llm, profile, postprocessing_batch=postprocessing_batch)
    for name, text in render_repository(deployment).items():
        version = temporary / name / "1"
        version.mkdir(parents=True)
        (temporary / name / "config.pbtxt").write_text(text, encoding="utf-8")
        if name not in without_code:
            shutil.copyfile(SOURCE / name / "1" / "model.py", version / "model.py")
    if profile == "gpu":
        info = xgrammar_tokenizer_info(
            load_tokenizer(artifacts.tokenizer_dir), artifacts.spec().llm.vocab_size
        )
        path = temporary / contract.TENSORRT_LLM.name / TOKENIZER_INFO
        path.write_text(json.dumps(info), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target
