"""What the engine benchmarks measure: a finished build, where its engines run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from build.engines import build_engines, default_precision
from build.gpu_servable import check_gpu_servable
from build.machine import this_machine
from build.model_source import artifact_name
from build.profile import choose_profile
from internvl_triton.artifacts import Artifacts, LLMBuild, Profile

__all__ = ["MeasuredBuild", "measured_build"]


@dataclass(frozen=True)
class MeasuredBuild:
    """Engines on disk that fit this machine, and which language model of them."""

    artifacts: Artifacts
    llm: LLMBuild
    profile: Profile


def measured_build(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    kv_cache: str | None = None,
    artifacts_dir: Path = Path("artifacts"),
) -> MeasuredBuild:
    """In the cpu profile it is brought up to date first; for GPUs `make engines` has to have run.

    Raises what `build_engines` raises, or ArtifactMismatch: not built, or not for this machine.
    """
    chosen = choose_profile(profile)
    if chosen == "cpu":
        artifacts = build_engines(
            model,
            tp_size=tp_size,
            profile=chosen,
            precision=precision,
            kv_cache=kv_cache,
            artifacts_dir=artifacts_dir,
            progress=False,
        )
    else:
        artifacts = Artifacts(artifacts_dir / artifact_name(model))
        artifacts.manifest()
    llm = LLMBuild(precision or default_precision(artifacts.spec()), tp_size, kv_cache)
    if chosen == "gpu":
        artifacts.spec().llm.check_tp_size(tp_size)
        check_gpu_servable(artifacts, llm, this_machine())
    return MeasuredBuild(artifacts, llm, chosen)
