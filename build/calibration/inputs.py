"""Samples -> what the language model sees of them, one safetensors file a sample.

    python -m build.calibration.inputs --artifacts DIR --output DIR [--samples DIR] [--limit N]

`input_ids` int32 (n,): as the service sends them, visual positions with vocab_size + k.
`features` float32 (num_visual_tokens, hidden): row k is what stands at vocab_size + k.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.calibration.samples import Sample, read_samples
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.preprocessing import Preprocessor
from internvl_triton.program import program
from internvl_triton.prompt import IM_END
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.vision_engine import VisionEngine
from internvl_triton.vision_runtime import ONNXRUNTIME, TENSORRT, load_vision_engine

__all__ = ["FEATURES", "INPUT_IDS", "write_inputs"]

INPUT_IDS, FEATURES = "input_ids", "features"


def write_inputs(
    samples: Iterable[Sample],
    directory: Path,
    *,
    preprocessor: Preprocessor,
    vision: VisionEngine[Any],
) -> int:
    """Write `directory`/00000.safetensors ... and return how many; an older directory is replaced.

    An answer follows its prompt, with <|im_end|>, as far as there is room for it.
    Raises BuildFailed, naming the sample, when a request is one that the service would refuse, and
    when there are no samples.
    """
    from safetensors.numpy import save_file

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    count = 0
    for count, sample in enumerate(samples, start=1):
        try:
            tensors = preprocessor(sample.request)
            answer = preprocessor.tokenizer.encode(sample.answer) if sample.answer else []
        except InvalidRequest as error:
            raise BuildFailed(f"calibration sample {sample.where}: {error}") from error
        if answer:
            answer.append(preprocessor.tokenizer.special_id(IM_END))
        prompt = tensors[contract.INPUT_IDS.name][0]
        ids = np.concatenate([prompt, np.array(answer, np.int32)])
        tiles = tensors[contract.TILES.name]
        features = _on_host(vision.encode(tiles)) if len(tiles) else _on_host(vision.zeros(1))[:0]
        save_file(
            {
                INPUT_IDS: ids[: preprocessor.limits.max_seq_len],
                FEATURES: np.ascontiguousarray(features),
            },
            directory / f"{count - 1:05d}.safetensors",
        )
    if not count:
        raise BuildFailed("the calibration set is empty; give at least one sample")
    return count


def _on_host(features: Any) -> NDArray[np.float32]:
    """float32 on the host, of a numpy array or a GPU tensor."""
    if isinstance(features, np.ndarray):
        return features.astype(np.float32, copy=False)
    array: NDArray[np.float32] = features.float().cpu().numpy()
    return array


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build.calibration.inputs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--artifacts", type=Path, required=True, help="of the model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--samples", type=Path, help="pictures and prompts (built-in ones)")
    parser.add_argument("--limit", type=int, default=512, help="samples at most (%(default)s)")
    parser.add_argument("--runtime", choices=(TENSORRT, ONNXRUNTIME), default=TENSORRT)
    args = parser.parse_args(argv)
    artifacts = Artifacts(args.artifacts)
    count = write_inputs(
        read_samples(args.samples, limit=args.limit),
        args.output,
        preprocessor=Preprocessor(
            artifacts.spec(), artifacts.limits(), load_tokenizer(artifacts.tokenizer_dir)
        ),
        vision=load_vision_engine(
            artifacts, {"runtime": args.runtime, "num_gpus": "1", "table_dtype": "BF16"}
        ),
    )
    print(f"{count} calibration samples", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
