"""Whether the artefacts on disk fit this release, this machine and each other."""

from __future__ import annotations

import json

from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import ArtifactMismatch

__all__ = ["built_llms", "check_servable"]


def built_llms(artifacts: Artifacts) -> list[LLMBuild]:
    """The converted language models that the manifest knows, in the order they were built."""
    names = [step.removeprefix("llm ") for step in artifacts.manifest().steps if step[:4] == "llm "]
    return [LLMBuild.from_name(name) for name in names]


def check_servable(
    artifacts: Artifacts, llm: LLMBuild, *, steps: tuple[str, ...] = (), rebuild: str = ""
) -> None:
    """Raise ArtifactMismatch, one sentence saying what does not fit and what to run.

    steps: those that must be finished besides the portable ones.
    rebuild: what to run.
    """
    manifest = artifacts.manifest()
    rebuild = rebuild or f"run: make engines MODEL={artifacts.name} TP={llm.tp_size}"
    for step in ("tokenizer", "vision", llm.step, *steps):
        if step not in manifest.steps:
            have = ", ".join(build.name for build in built_llms(artifacts)) or "none"
            raise ArtifactMismatch(
                f"{artifacts.root} has no finished step {step!r} (language models built: {have}); "
                f"{rebuild}"
            )
        made_from = manifest.steps[step]["checkpoint_sha256"]
        if made_from != manifest.checkpoint_sha256:
            raise ArtifactMismatch(
                f"step {step!r} of {artifacts.root} was made from another checkpoint "
                f"({made_from[:12]}, the others from {manifest.checkpoint_sha256[:12]}); {rebuild}"
            )
    for path in (artifacts.vision_onnx, artifacts.llm_checkpoint(llm) / "config.json"):
        if not path.is_file():
            raise ArtifactMismatch(f"{path} is missing; {rebuild}")
    spec, limits = artifacts.spec(), artifacts.limits()
    config = json.loads((artifacts.llm_checkpoint(llm) / "config.json").read_text())
    for key, found, expected in (
        ("tp_size", config["mapping"]["tp_size"], llm.tp_size),
        ("vocab_size", config["vocab_size"], spec.llm.vocab_size),
        ("hidden_size", config["hidden_size"], spec.llm.hidden_size),
    ):
        if found != expected:
            raise ArtifactMismatch(
                f"the converted language model has {key} {found}, expected {expected}; {rebuild}"
            )
    if limits.max_tiles_per_request < spec.max_tiles_with_thumbnail:
        raise ArtifactMismatch(
            f"max_tiles_per_request {limits.max_tiles_per_request} is below the "
            f"{spec.max_tiles_with_thumbnail} tiles of one picture; {rebuild}"
        )
