"""`certificate.json`: what was compared with what, and the outcome."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build.parity.checks import Check
from internvl_triton.artifacts import LLMBuild, Manifest, Profile

__all__ = ["CERTIFICATE_VERSION", "Certificate"]

CERTIFICATE_VERSION = 1


@dataclass(frozen=True)
class Certificate:
    """written_at: UTC, ISO 8601. engines, reference: what computed each side, for people."""

    manifest: Manifest
    llm: LLMBuild
    profile: Profile
    written_at: str
    engines: str
    reference: str
    versions: dict[str, str]
    checks: Sequence[Check]
    information: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """A measured value that is no finite number, such as for another shape, is null."""
        checks = [
            {
                **asdict(check),
                "measured": check.measured if math.isfinite(check.measured) else None,
                "passed": check.passed,
            }
            for check in self.checks
        ]
        return {
            "certificate_version": CERTIFICATE_VERSION,
            "passed": self.passed,
            "model": self.manifest.model,
            "checkpoint_sha256": self.manifest.checkpoint_sha256,
            "profile": self.profile,
            "precision": self.llm.precision,
            "tp_size": self.llm.tp_size,
            "written_at": self.written_at,
            "engines": self.engines,
            "reference": self.reference,
            "versions": self.versions,
            "checks": checks,
            "information": self.information,
            "manifest": asdict(self.manifest),
        }

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
