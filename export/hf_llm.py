"""The language model of an original-format checkpoint as a directory of its own for transformers.

    python -m export.hf_llm --checkpoint DIR --output DIR

A plain Qwen2ForCausalLM or InternLM2ForCausalLM, for tools that know no InternVL: quantisers,
evaluation harnesses. Weights are copied byte for byte, one tensor at a time, with `language_model.`
cut from their names.

`as_llama` writes InternLM2 as LlamaForCausalLM instead, which it is once `wqkv` is split: no code
of the checkpoint runs then, and what knows Llama knows it. `rope_scaling` is null there, as dynamic
NTK is the identity up to max_position_embeddings.

`rope_scaling` stays as it is in the source. InternLM2's {"type": "dynamic"} changes nothing up to
max_position_embeddings; a TensorRT-LLM 0.21 checkpoint that another tool makes from this directory
must have `rotary_scaling` set to null, or long prompts get wrong positions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.output_directory import check_disk, output_directory
from export.tensor_parallel import split_wqkv
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import Shapes, llm_shapes
from internvl_triton.model_spec import LLMSpec, ModelSpec
from internvl_triton.program import program
from internvl_triton.safetensors_file import Layout, SafetensorsWriter, num_bytes
from internvl_triton.tokenizer import load_tokenizer

__all__ = ["export_hf_llm"]

PREFIX = "language_model."
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_METADATA = {"format": "pt"}  # transformers refuses files without it
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# InternLM2 is no class of transformers: its code travels with the checkpoint.
_CODE_FILES = (
    "configuration_internlm2.py",
    "modeling_internlm2.py",
    "tokenization_internlm2.py",
    "tokenization_internlm2_fast.py",
)
_AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
# InternLM2 with wqkv split is Llama; `bias` is false in every checkpoint that is converted.
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
_LLAMA_NAMES = (
    ("tok_embeddings.", "embed_tokens."),
    ("attention.wo.", "self_attn.o_proj."),
    ("feed_forward.w1.", "mlp.gate_proj."),
    ("feed_forward.w3.", "mlp.up_proj."),
    ("feed_forward.w2.", "mlp.down_proj."),
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("output.", "lm_head."),
)
# How and where somebody ran the model, not what it is; `auto_map` is written anew.
_DROPPED = ("_name_or_path", "attn_implementation", "_attn_implementation_autoset", "auto_map")
_HOLDS = (
    r"(config|generation_config)\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|"
    + ("|".join(name.replace(".", r"\.") for name in (*_TOKENIZER_FILES, *_CODE_FILES)))
)


def export_hf_llm(
    checkpoint_dir: Path, output_dir: Path, *, as_llama: bool = False, progress: bool = True
) -> Path:
    """Write config.json, generation_config.json, tokenizer files and safetensors; return the path.

    There are as many shards as hold language model tensors in the source. generation_config.json
    ends answers at <|im_end|>, as the reference's `chat()` does. InternLM2 also needs its modeling
    files, which are copied if the checkpoint has them. The directory appears whole or not at all;
    an older one is replaced.

    as_llama: a LlamaForCausalLM, if the family is InternLM2; Qwen2 stays Qwen2.

    Raises IncompleteCheckpoint, InvalidCheckpoint, UnsupportedCheckpoint, or BuildFailed when the
    disk is too small or `output_dir` holds other files.
    """
    checkpoint_dir, output_dir = Path(checkpoint_dir), Path(output_dir)
    spec = ModelSpec.from_checkpoint(checkpoint_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    shapes = llm_shapes(spec.llm)
    checkpoint.check(shapes)
    tokenizer = load_tokenizer(checkpoint_dir)
    source = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    as_llama = as_llama and spec.llm.family == "internlm2"
    shards: dict[str, list[str]] = {}  # names of the source's tensors by its file
    for name in shapes:
        shards.setdefault(checkpoint.shard(name), []).append(name)
    check_disk(
        output_dir,
        num_bytes({name: (checkpoint.dtype(name), shape) for name, shape in shapes.items()}),
    )
    with output_directory(output_dir, holds=_HOLDS) as unfinished:
        _copy(checkpoint_dir, unfinished, _TOKENIZER_FILES)
        if not as_llama:
            _copy(checkpoint_dir, unfinished, _CODE_FILES)
        has_code = all((unfinished / name).is_file() for name in _CODE_FILES[:2])
        config = _config(source, spec, has_code=has_code)
        _write_json(unfinished / "config.json", config | (_LLAMA if as_llama else {}))
        generation = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id is not None:
            generation["bos_token_id"] = tokenizer.bos_id
        _write_json(unfinished / "generation_config.json", generation)
        parts = _llama_parts(spec.llm) if as_llama else _same_part
        layouts = [_layout(checkpoint, shapes, names, parts) for names in shards.values()]
        _write_shards(
            checkpoint,
            unfinished,
            list(zip(shards.values(), layouts, strict=True)),
            parts,
            progress=progress,
        )
    return output_dir


def _config(source: dict[str, Any], spec: ModelSpec, *, has_code: bool) -> dict[str, Any]:
    """config.json: `llm_config` with what the outer config decides for it."""
    qwen2 = spec.llm.family == "qwen2"
    config = {key: value for key, value in source["llm_config"].items() if key not in _DROPPED}
    config |= {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "InternLM2ForCausalLM"],
        "model_type": spec.llm.family,
        "torch_dtype": spec.dtype,
        "tie_word_embeddings": False,  # InternVLChatConfig forces it; the class default is True
    }
    if has_code:
        config["auto_map"] = _AUTO_MAP
    return config


Parts = Callable[[str, NDArray[Any]], list[tuple[str, NDArray[Any]]]]


def _same_part(name: str, tensor: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    return [(name, tensor)]


def _llama_parts(spec: LLMSpec) -> Parts:
    """Llama's tensors that one of InternLM2's makes."""

    def parts(name: str, tensor: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
        if not name.endswith("attention.wqkv.weight"):
            for ours, llamas in _LLAMA_NAMES:
                name = name.replace(ours, llamas)
            return [(name, tensor)]
        prefix = name.removesuffix("attention.wqkv.weight")
        heads = split_wqkv(
            tensor,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        return [
            (f"{prefix}self_attn.{letter}_proj.weight", part)
            for letter, part in zip("qkv", heads, strict=True)
        ]

    return parts


def _layout(checkpoint: Checkpoint, shapes: Shapes, names: list[str], parts: Parts) -> Layout:
    """Target tensors of one shard, made of `names`. No tensor is read for it."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        empty = np.empty(shapes[name], np.int8)
        for target, part in parts(name.removeprefix(PREFIX), empty):
            layout[target] = (checkpoint.dtype(name), part.shape)
    return layout


def _write_shards(
    checkpoint: Checkpoint,
    directory: Path,
    shards: list[tuple[list[str], Layout]],
    parts: Parts,
    *,
    progress: bool,
) -> None:
    from tqdm import tqdm

    weight_map: dict[str, str] = {}
    num_all_bytes = sum(num_bytes(layout) for _, layout in shards)
    with tqdm(
        total=num_all_bytes,
        unit="B",
        unit_scale=True,
        desc="language model",
        disable=not progress,
    ) as bar:
        for number, (names, layout) in enumerate(shards, start=1):
            file = (
                _SINGLE
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            with SafetensorsWriter(directory / file, layout, metadata=_METADATA) as writer:
                for name in names:
                    for target, part in parts(name.removeprefix(PREFIX), checkpoint.read(name)):
                        writer.write(target, part)
                        bar.update(part.nbytes)
                        weight_map[target] = file
    if len(shards) > 1:
        total = {"total_size": num_all_bytes}
        _write_json(directory / _INDEX, {"metadata": total, "weight_map": weight_map})


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.hf_llm",
        description="Write the LLM of an InternVL2.5 checkpoint as a plain transformers directory.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="directory with config.json and safetensors"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write; it is replaced as a whole"
    )
    args = parser.parse_args(argv)
    output = export_hf_llm(args.checkpoint, args.output)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
