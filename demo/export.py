"""Write what the training has so far as a checkpoint in the original format, Qwen2 layout.

python -m demo.export
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from demo.model import Weights, demo_config
from demo.vocabulary import demo_vocabulary
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import IncompleteCheckpoint
from internvl_triton.model_spec import ModelSpec
from internvl_triton.safetensors_file import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main", "read_average", "write_qwen2_layout"]


def write_qwen2_layout(weights: Weights, directory: Path) -> Path:
    """config.json, tokenizer files, model.safetensors in bfloat16. q, k and v biases are zero.

    weights: as the training keeps them.
    """
    vocabulary = demo_vocabulary()
    config = demo_config(len(vocabulary.qwen2_tokens))
    spec = ModelSpec.from_config(config)
    shapes = checkpoint_shapes(spec)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    vocabulary.write_qwen2(directory)
    with SafetensorsWriter(
        directory / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}
    ) as writer:
        for name, shape in shapes.items():
            if name in weights:
                writer.write(name, _numpy(weights[name]))
            else:
                writer.write(name, np.zeros(shape, ml_dtypes.bfloat16))
    return directory


def read_average(training: Path) -> Weights:
    """The averaged weights of the training in this directory. Raises IncompleteCheckpoint."""
    import torch

    path = training / "state.pt"
    if not path.is_file():
        raise IncompleteCheckpoint(
            f"{training} has no state.pt: no training has run there; run python -m demo.train"
        )
    average: Weights = torch.load(path, weights_only=True)["average"]
    return average


def _numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[ml_dtypes.bfloat16]]:
    return tensor.detach().float().numpy().astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    training = Path("artifacts/demo-training")
    parser.add_argument("--training", type=Path, default=training, help=f"default {training}")
    target = training / "checkpoint"
    parser.add_argument("--directory", type=Path, default=target, help=f"default {target}")
    arguments = parser.parse_args()
    print(write_qwen2_layout(read_average(arguments.training), arguments.directory))  # noqa: T201


if __name__ == "__main__":
    main()
