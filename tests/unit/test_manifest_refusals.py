"""Artefacts that do not fit each other are refused before a server starts, in one sentence each.

What needs a GPU machine to be wrong (versions, compute capability, number of GPUs, engines) is in
`test_gpu_serving_checks.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build import build_engines, make_server
from build.servable import check_servable
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import ArtifactMismatch

LLM = LLMBuild("bf16", 2)
Change = Callable[[Artifacts], None]


@pytest.fixture(scope="module")
def built_once(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return build_engines(
        str(checkpoints["qwen2"]),
        tp_size=2,
        profile="cpu",
        artifacts_dir=tmp_path_factory.mktemp("manifest") / "artifacts",
        progress=False,
    )


@pytest.fixture
def built(built_once: Artifacts, tmp_path: Path) -> Artifacts:
    return Artifacts(shutil.copytree(built_once.root, tmp_path / "artifacts" / built_once.name))


def converted(**values: Any) -> Change:
    def change(artifacts: Artifacts) -> None:
        path = artifacts.llm_checkpoint(LLM) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def made_from_another_checkpoint(step: str) -> Change:
    def change(artifacts: Artifacts) -> None:
        manifest = artifacts.manifest()
        manifest.steps[step]["checkpoint_sha256"] = "0123456789abcdef"
        artifacts.write_manifest(manifest)

    return change


def limits(**values: int) -> Change:
    def change(artifacts: Artifacts) -> None:
        manifest = artifacts.manifest()
        manifest.limits |= values
        artifacts.write_manifest(manifest)

    return change


def pictures_of_more_tiles(artifacts: Artifacts) -> None:
    """Preprocessing would cut a picture into more tiles than a request may have."""
    path = artifacts.tokenizer_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_dynamic_patch": 64}))


def unfinished(step: str) -> Change:
    def change(artifacts: Artifacts) -> None:
        manifest = artifacts.manifest()
        del manifest.steps[step]
        artifacts.write_manifest(manifest)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (converted(mapping={"tp_size": 4}), "has tp_size 4, expected 2"),
        (converted(vocab_size=92553), "has vocab_size 92553, expected 1283"),
        (converted(hidden_size=896), "has hidden_size 896, expected 256"),
        (limits(max_tiles_per_request=12), "12 is below the 13 tiles of one picture"),
        (pictures_of_more_tiles, "64 is below the 65 tiles of one picture"),
        *(
            (made_from_another_checkpoint(step), f"'{step}' .* another checkpoint .0123456789ab, ")
            for step in ("tokenizer", "vision", LLM.step)
        ),
        *((unfinished(step), f"no finished step '{step}'") for step in ("vision", LLM.step)),
        (lambda built: built.vision_onnx.unlink(), r"vision_encoder\.onnx is missing"),
    ],
)
def test_what_does_not_fit_is_refused(built: Artifacts, change: Change, sentence: str) -> None:
    check_servable(built, LLM)
    change(built)
    with pytest.raises(ArtifactMismatch, match=sentence) as refused:
        check_servable(built, LLM)
    assert "\n" not in str(refused.value)
    assert f"run: make engines MODEL={built.name}" in str(refused.value)
    with pytest.raises(ArtifactMismatch, match=sentence):
        make_server(str(built.root), tp_size=2, profile="cpu", artifacts_dir=built.root.parent)
