"""InternViT, pixel shuffle and projector of a checkpoint as one ONNX graph.

    python -m export.vision_onnx --checkpoint DIR --output DIR

The graph is written, not traced: no torch, no model in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from export.onnx_graph import OnnxGraph
from export.output_directory import output_directory
from export.vision_graph import VisionGraph
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import projector_shapes, vision_shapes
from internvl_triton.errors import InternVLTritonError
from internvl_triton.model_spec import ModelSpec

__all__ = ["export_vision"]

ONNX_NAME = "vision_encoder.onnx"


def export_vision(checkpoint_dir: Path, output_dir: Path, *, progress: bool = True) -> Path:
    """Write `output_dir`/vision_encoder.onnx and its weights, vision_encoder.onnx.data.

    Input `tiles`: uint8 (num_tiles, image_size, image_size, 3). Output `prompt_embedding_table`:
    float32 (num_tiles * tokens_per_tile, hidden_size). Weights keep the checkpoint's dtype. Only
    `vision_model.*` and `mlp1.*` are read, one tensor at a time. `output_dir` appears when both
    files are complete; an older one is replaced, with the engine that was built from it.

    Raises IncompleteCheckpoint, InvalidCheckpoint, UnsupportedCheckpoint, or BuildFailed when
    `output_dir` holds something else.
    """
    spec = ModelSpec.from_checkpoint(checkpoint_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    expected = {**vision_shapes(spec.vision), **projector_shapes(spec)}
    checkpoint.check(expected)

    from tqdm import tqdm

    with (
        output_directory(output_dir, holds=r"vision_encoder\..*") as unfinished,
        OnnxGraph(unfinished / ONNX_NAME) as graph,
        tqdm(total=len(expected), unit="tensor", desc="vision", disable=not progress) as bar,
    ):

        def read(name: str) -> NDArray[Any]:
            del expected[name]
            bar.update()
            return checkpoint.read(name)

        VisionGraph(graph, spec, read).write()
        assert not expected, f"never read: {sorted(expected)}"
    return Path(output_dir) / ONNX_NAME


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.vision_onnx", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, required=True, help="InternVL2.5 directory")
    parser.add_argument("--output", type=Path, required=True, help="directory of the ONNX files")
    args = parser.parse_args(argv)
    try:
        path = export_vision(args.checkpoint, args.output)
    except (InternVLTritonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
