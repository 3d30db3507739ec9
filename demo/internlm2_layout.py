"""The demo checkpoint again, in the InternLM2 layout: same weights, other names and order.

It answers like the Qwen2 layout because the two language models are the same function without
q/k/v biases, and because the two vocabularies differ by a table of ids. `<s>`, which InternLM2
puts in front of every prompt, has a zero embedding: its keys and values are zero in every layer,
and the training has seen rows with and without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from demo.vocabulary import Vocabulary, demo_vocabulary
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import UnsupportedCheckpoint
from internvl_triton.model_spec import ModelSpec
from internvl_triton.safetensors_file import SafetensorsWriter

__all__ = ["internlm2_config", "main", "write_internlm2_layout"]

_LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_internlm2_layout(source: Path, directory: Path) -> Path:
    """`source`: the demo checkpoint in the Qwen2 layout. Returns `directory`.

    Raises UnsupportedCheckpoint when a q, k or v bias of `source` is not zero, or when its
    vocabulary is not the one that the questions and answers give.
    """
    vocabulary = demo_vocabulary()
    _check_vocabulary(source, vocabulary)
    qwen2 = Checkpoint(source)
    config = internlm2_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    spec = ModelSpec.from_config(config)
    shapes = checkpoint_shapes(spec)
    directory.mkdir(parents=True, exist_ok=True)
    _check_biases(qwen2)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    vocabulary.write_internlm2(directory)
    with SafetensorsWriter(
        directory / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}
    ) as writer:
        for name in shapes:
            writer.write(name, _tensor(qwen2, name, vocabulary, spec))
    return directory


def internlm2_config(config: dict[str, Any]) -> dict[str, Any]:
    """The Qwen2 layout's config.json for the InternLM2 layout."""
    llm = {key: value for key, value in config["llm_config"].items() if key != "use_sliding_window"}
    llm |= {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": len(demo_vocabulary().internlm2_tokens),
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    return {**config, "llm_config": llm}


def _check_vocabulary(source: Path, vocabulary: Vocabulary) -> None:
    """Rows of another vocabulary would go to wrong places without a sign of it."""
    ids: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        ids |= json.loads((source / name).read_text(encoding="utf-8"))
    if sorted(ids, key=ids.__getitem__) != vocabulary.qwen2_tokens:
        raise UnsupportedCheckpoint(
            f"{source} has another vocabulary than the questions and answers in demo/dialogue.py "
            "give; restore those it was trained with, or train it again"
        )


def _check_biases(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names:
        if name.endswith("_proj.bias") and checkpoint.read(name).astype(np.float32).any():
            raise UnsupportedCheckpoint(
                f"{name} is not zero; InternLM2 has no biases, so only a checkpoint whose q, k "
                "and v biases are all zero can take its layout"
            )


def _tensor(
    qwen2: Checkpoint, name: str, vocabulary: Vocabulary, spec: ModelSpec
) -> NDArray[ml_dtypes.bfloat16]:
    if not name.startswith("language_model."):
        return qwen2.read(name)
    if name == "language_model.model.tok_embeddings.weight":
        rows = _rows(qwen2.read("language_model.model.embed_tokens.weight"), vocabulary)
        rows[vocabulary.internlm2_tokens.index("<s>")] = 0
        return rows
    if name == "language_model.output.weight":
        return _rows(qwen2.read("language_model.lm_head.weight"), vocabulary)
    if name.endswith("attention.wqkv.weight"):
        prefix = name.removesuffix("attention.wqkv.weight") + "self_attn."
        return _grouped([qwen2.read(f"{prefix}{letter}_proj.weight") for letter in "qkv"], spec)
    for ours, theirs in _LAYER_NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return qwen2.read(name)


def _rows(table: NDArray[Any], vocabulary: Vocabulary) -> NDArray[Any]:
    """Rows in InternLM2's order. Ids that only it has act like <|endoftext|>: never the answer."""
    spare = vocabulary.qwen2_tokens.index("<|endoftext|>")
    rows = [spare if index is None else index for index in vocabulary.qwen2_id]
    taken: NDArray[Any] = table[rows]
    return taken


def _grouped(qkv: list[NDArray[Any]], spec: ModelSpec) -> NDArray[Any]:
    """For every kv head: its query heads, its key head, its value head."""
    kv_heads, head_dim, hidden = spec.llm.num_kv_heads, spec.llm.head_dim, spec.llm.hidden_size
    parts = [part.reshape(kv_heads, -1, head_dim, hidden) for part in qkv]
    return np.concatenate(parts, 1).reshape(-1, hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="checkpoint, Qwen2 layout")
    parser.add_argument("--directory", type=Path, required=True, help="where to write")
    arguments = parser.parse_args()
    print(write_internlm2_layout(arguments.source, arguments.directory))  # noqa: T201


if __name__ == "__main__":
    main()
