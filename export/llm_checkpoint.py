"""The language model of an original-format checkpoint as a TensorRT-LLM 0.21 checkpoint.

    python -m export.llm_checkpoint --checkpoint DIR --output DIR --tp-size N

Writes config.json and rank{r}.safetensors. One source tensor is in memory at a time; every rank
file is open and gets its part of it. `export/precision.py` says what is stored for which precision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.output_directory import check_disk, output_directory
from export.precision import (
    DTYPES,
    PRECISIONS,
    QUANT_ALGOS,
    check_precision,
    stored_precision,
)
from export.tensor_parallel import (
    split_columns,
    split_heads,
    split_rows,
    split_vocabulary,
    split_wqkv,
)
from export.trtllm_config import trtllm_config
from internvl_triton.checkpoint import Checkpoint, is_finite
from internvl_triton.checkpoint_layout import llm_shapes
from internvl_triton.cpu_llm.rank_layout import kv_heads_per_rank, rank_shapes
from internvl_triton.errors import InvalidCheckpoint
from internvl_triton.model_spec import LLMSpec, ModelSpec
from internvl_triton.program import program
from internvl_triton.safetensors_file import SafetensorsWriter, num_bytes, numpy_dtype

__all__ = ["checkpoint_config", "export_llm"]

_STORED_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # safetensors' names
BLOCK_BYTES = 32 * 2**20  # converted and written at once

# Target name of each source tensor of a layer, and the way it is divided.
_ROWS = {
    "mlp.gate_proj.weight": "mlp.fc.weight",  # TensorRT-LLM applies SiLU to fc
    "mlp.up_proj.weight": "mlp.gate.weight",
    "feed_forward.w1.weight": "mlp.fc.weight",
    "feed_forward.w3.weight": "mlp.gate.weight",
}
_COLUMNS = {
    "self_attn.o_proj.weight": "attention.dense.weight",
    "mlp.down_proj.weight": "mlp.proj.weight",
    "attention.wo.weight": "attention.dense.weight",
    "feed_forward.w2.weight": "mlp.proj.weight",
}
_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_layernorm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_layernorm.weight",
}
_EMBEDDINGS = ("model.embed_tokens.weight", "model.tok_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight")


def export_llm(
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    tp_size: int,
    precision: str | None = None,
    progress: bool = True,
) -> Path:
    """Write `output_dir`/config.json and rank0.safetensors ... and return `output_dir`.

    precision: None keeps the checkpoint's own torch_dtype; "int8" and "int4" (weight-only) store
    the same tensors and name the quantisation in config.json, for whoever loads them. The directory
    appears whole or not at all; an older conversion under that name is replaced.

    Raises InvalidTensorParallel, IncompleteCheckpoint, InvalidCheckpoint, UnsupportedCheckpoint, or
    BuildFailed when this model cannot have that precision, the disk is too small or `output_dir`
    holds other files.
    """
    spec = ModelSpec.from_checkpoint(checkpoint_dir)
    spec.llm.check_tp_size(tp_size)
    if precision is not None:
        check_precision(spec, precision, tp_size)
    stored = stored_precision(precision, spec.dtype)
    checkpoint = Checkpoint(checkpoint_dir)
    sources = llm_shapes(spec.llm)
    checkpoint.check(sources)
    stored_dtype = _STORED_DTYPES[stored]
    layout = {name: (stored_dtype, shape) for name, shape in rank_shapes(spec.llm, tp_size).items()}
    output_dir = Path(output_dir)
    check_disk(output_dir, tp_size * num_bytes(layout))

    from tqdm import tqdm

    with output_directory(output_dir, holds=r"config\.json|rank\d+\.safetensors") as unfinished:
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(
                    total=sum(math.prod(shape) for shape in sources.values()),
                    unit=" weights",
                    unit_scale=True,
                    desc=f"language model, TP {tp_size}",
                    disable=not progress,
                )
            )
            ranks = [
                stack.enter_context(
                    SafetensorsWriter(unfinished / f"rank{rank}.safetensors", layout)
                )
                for rank in range(tp_size)
            ]
            for source, shape in sources.items():
                tensor = checkpoint.read(source)
                for target, first_row, parts in _divide(spec.llm, source, tensor, tp_size):
                    for writer, part in zip(ranks, parts, strict=True):
                        _write(writer, target, first_row, part, stored_dtype, source)
                bar.update(math.prod(shape))
        config = checkpoint_config(spec, tp_size=tp_size, precision=precision)
        (unfinished / "config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
    return output_dir


def checkpoint_config(
    spec: ModelSpec, *, tp_size: int, precision: str | None, kv_cache: str | None = None
) -> dict[str, Any]:
    """config.json of the checkpoint. precision: any known one; kv_cache: "fp8", "int8" or None."""
    return trtllm_config(
        spec.llm,
        tp_size=tp_size,
        dtype=DTYPES[stored_precision(precision, spec.dtype)],
        quant_algo=QUANT_ALGOS.get(precision or ""),
        kv_cache_quant_algo=kv_cache and kv_cache.upper(),
    )


def _divide(
    spec: LLMSpec, source: str, tensor: NDArray[Any], tp_size: int
) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    """Where `tensor` goes: (target name, first row there, one array per rank)."""
    name = source.removeprefix("language_model.")
    if name in _EMBEDDINGS:
        yield "transformer.vocab_embedding.weight", 0, [tensor] * tp_size
    elif name in _HEADS:
        yield "lm_head.weight", 0, split_vocabulary(tensor, tp_size)
    elif name == "model.norm.weight":
        yield "transformer.ln_f.weight", 0, [tensor] * tp_size
    else:
        _, _, layer, leaf = name.split(".", 3)
        prefix = f"transformer.layers.{layer}."
        if leaf in _ROWS:
            yield prefix + _ROWS[leaf], 0, split_rows(tensor, tp_size)
        elif leaf in _COLUMNS:
            yield prefix + _COLUMNS[leaf], 0, split_columns(tensor, tp_size)
        elif leaf in _REPLICATED:
            yield prefix + _REPLICATED[leaf], 0, [tensor] * tp_size
        else:
            for letter, kind, part in _qkv_parts(spec, leaf, tensor):
                first_row, parts = _split_projection(spec, letter, part, tp_size)
                yield f"{prefix}attention.qkv.{kind}", first_row, parts


def _qkv_parts(
    spec: LLMSpec, leaf: str, tensor: NDArray[Any]
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """(letter, "weight" or "bias", all heads of that projection in order)."""
    if leaf == "attention.wqkv.weight":
        parts = split_wqkv(
            tensor,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        for letter, part in zip("qkv", parts, strict=True):
            yield letter, "weight", part
    else:  # self_attn.{q,k,v}_proj.{weight,bias}
        _, projection, kind = leaf.split(".")
        yield projection[0], kind, tensor


def _split_projection(
    spec: LLMSpec, letter: str, tensor: NDArray[Any], tp_size: int
) -> tuple[int, list[NDArray[Any]]]:
    """First row of q, k or v in a rank's [q; k; v], and the heads of each rank."""
    q_rows = spec.num_heads // tp_size * spec.head_dim
    kv_rows = kv_heads_per_rank(spec, tp_size) * spec.head_dim
    first_row = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}[letter]
    heads = spec.num_heads if letter == "q" else spec.num_kv_heads
    return first_row, split_heads(tensor, num_heads=heads, tp_size=tp_size)


def _write(
    writer: SafetensorsWriter,
    target: str,
    first_row: int,
    part: NDArray[Any],
    stored_dtype: str,
    source: str,
) -> None:
    """Convert and write `part` in blocks of rows, so that no second copy of it exists."""
    dtype = numpy_dtype(stored_dtype)
    row_bytes = math.prod(part.shape[1:]) * 4
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(part), step):
        block = part[start : start + step]
        if block.dtype != dtype:
            with np.errstate(over="ignore"):  # an overflow is an error of its own, below
                block = block.astype(dtype)
            if stored_dtype == "F16" and not is_finite(block):
                raise InvalidCheckpoint(
                    f"{source} holds values beyond fp16's 65504; use --precision bf16 or fp32"
                )
        writer.write(target, block, first_row=first_row + start)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.llm_checkpoint",
        description="Convert the LLM of an InternVL2.5 checkpoint to TensorRT-LLM 0.21's format.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="directory with config.json and safetensors"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write; it is replaced as a whole"
    )
    parser.add_argument(
        "--tp-size", type=int, default=1, help="GPUs that share the model (default: 1)"
    )
    parser.add_argument(
        "--precision",
        help=f"one of {', '.join(PRECISIONS)} (default: the checkpoint's torch_dtype)",
    )
    args = parser.parse_args(argv)
    output = export_llm(
        args.checkpoint, args.output, tp_size=args.tp_size, precision=args.precision
    )
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
