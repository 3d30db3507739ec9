"""MODEL's language model on its own, for transformers: artifacts/<model>/llm/hf/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from build.model_source import DEMO, artifact_name, resolve_checkpoint
from internvl_triton.program import program

__all__ = ["build_hf_llm"]


def build_hf_llm(model: str, *, artifacts_dir: Path = Path("artifacts")) -> Path:
    """Write the directory and return it.

    Raises UnknownModel, DownloadFailed, InvalidCheckpoint, BuildFailed.
    """
    from export import export_hf_llm

    output = artifacts_dir / artifact_name(model) / "llm" / "hf"
    return export_hf_llm(resolve_checkpoint(model, artifacts_dir), output)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.hf_llm", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    output = build_hf_llm(args.model, artifacts_dir=args.artifacts)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
