"""Write the committed model_repository/*/config.pbtxt: the demo's configs, from the contract."""

from __future__ import annotations

import argparse
from pathlib import Path

from build.demo_checkpoint import DEMO, demo_spec
from build.repository import SOURCE
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.limits import Limits
from internvl_triton.triton_config import Deployment, render_repository

__all__ = ["committed_configs"]


def committed_configs() -> dict[str, str]:
    """Model name -> config.pbtxt text, serving artifacts/demo from the project's own folder."""
    spec = demo_spec(DEMO)
    root = Path("artifacts") / DEMO
    llm = Artifacts(root).llm_checkpoint(LLMBuild("bf16", 1))
    return render_repository(
        Deployment(
            spec=spec,
            limits=Limits.for_model(spec),
            model=DEMO,
            artifacts_dir=str(Path("../..") / root),
            llm_checkpoint=str(llm.relative_to(root)),
        )
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.render_configs", description=__doc__)
    parser.parse_args(argv)
    for name, text in committed_configs().items():
        path = SOURCE / name / "config.pbtxt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(SOURCE.parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
