"""`artifacts/<model>/`: everything a machine made from one checkpoint, and its manifest.

tokenizer/                     config.json and the tokenizer files, copied
vision/vision_encoder.onnx     + external data
vision/vision_encoder.plan     gpu profile
llm/<precision>-tp<N>/checkpoint/
llm/<precision>-tp<N>/engine/  gpu profile
certificates/<precision>-tp<N>-<profile>/{certificate.json,certificate.html}
repository/                    the Triton model repository
manifest.json                  what was built, from which bytes, with which limits
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from internvl_triton.errors import ArtifactMismatch
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["Artifacts", "LLMBuild", "Manifest", "Profile"]

Profile = Literal["cpu", "gpu"]

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class LLMBuild:
    """One converted language model: weights of `precision` split over `tp_size` ranks.

    kv_cache: "fp8" or "int8" keys and values; None has the engine's 16 bits.
    """

    precision: str
    tp_size: int
    kv_cache: str | None = None

    @property
    def name(self) -> str:
        cache = f"-kv_{self.kv_cache}" if self.kv_cache else ""
        return f"{self.precision}{cache}-tp{self.tp_size}"

    @classmethod
    def from_name(cls, name: str) -> LLMBuild:
        """The build whose `name` this is."""
        weights, _, tp_size = name.rpartition("-tp")
        precision, _, kv_cache = weights.partition("-kv_")
        return cls(precision, int(tp_size), kv_cache or None)

    @property
    def options(self) -> str:
        """What to give to make for it, such as "TP=2 PRECISION=fp8 KV_CACHE=fp8"."""
        cache = f" KV_CACHE={self.kv_cache}" if self.kv_cache else ""
        return f"TP={self.tp_size} PRECISION={self.precision}{cache}"

    @property
    def step(self) -> str:
        """The name of its conversion among the manifest's steps."""
        return f"llm {self.name}"

    @property
    def engine_step(self) -> str:
        """The name of its TensorRT-LLM engine among the manifest's steps."""
        return f"engine {self.name}"


@dataclass
class Manifest:
    """The contract between build and serve.

    steps: name of a finished step -> the key of what it was made from, the checkpoint's hash at
    that time, and for a step that compiled for a GPU, with what and for which. A step whose key
    has changed is out of date.
    """

    model: str
    checkpoint_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    checkpoint_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifest_version: int = MANIFEST_VERSION


class Artifacts:
    """Paths and contents of one artefact directory."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def tokenizer_dir(self) -> Path:
        return self.root / "tokenizer"

    @property
    def vision_dir(self) -> Path:
        return self.root / "vision"

    @property
    def vision_onnx(self) -> Path:
        return self.vision_dir / "vision_encoder.onnx"

    @property
    def vision_plan(self) -> Path:
        return self.vision_dir / "vision_encoder.plan"

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def llm_checkpoint(self, build: LLMBuild) -> Path:
        return self.root / "llm" / build.name / "checkpoint"

    def llm_engine(self, build: LLMBuild) -> Path:
        return self.root / "llm" / build.name / "engine"

    def certificate_dir(self, build: LLMBuild, profile: Profile) -> Path:
        return self.root / "certificates" / f"{build.name}-{profile}"

    def spec(self) -> ModelSpec:
        return ModelSpec.from_checkpoint(self.tokenizer_dir)

    def limits(self) -> Limits:
        return Limits.from_json(self.manifest().limits)

    def manifest(self) -> Manifest:
        """Raises ArtifactMismatch when it is missing, unreadable or of another version."""
        try:
            values = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactMismatch(
                f"{self.root} has no manifest.json: nothing was built there; "
                f"run: make engines MODEL={self.name}"
            ) from None
        except ValueError as error:
            raise ArtifactMismatch(
                f"{self.manifest_path} is not valid JSON ({error}); delete {self.root} and run: "
                f"make engines MODEL={self.name}"
            ) from error
        if values.get("manifest_version") != MANIFEST_VERSION:
            raise ArtifactMismatch(
                f"{self.manifest_path} has version {values.get('manifest_version')!r}; this "
                f"release reads {MANIFEST_VERSION}; delete {self.root} and run: "
                f"make engines MODEL={self.name}"
            )
        return Manifest(**values)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace manifest.json in one step."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.manifest_path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.manifest_path)

    @classmethod
    def of_model(cls, args: dict[str, str]) -> Artifacts:
        """The artefacts that a Triton Python model serves, from `initialize`'s arguments.

        The model's parameter `artifacts_dir` is relative to the model's own folder.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        relative = parameters["artifacts_dir"]["string_value"]
        return cls((Path(args["model_repository"]) / relative).resolve())
