"""The language model of an original-format checkpoint as a directory of its own for transformers.

    python -m export.hf_llm --checkpoint DIR --output DIR

A plain Qwen2ForCausalLM or InternLM2ForCausalLM, for tools that know no InternVL: quantisers,
evaluation harnesses. Weights are copied byte for byte, one tensor at a time, with `language_model.`
cut from their names.

`rope_scaling` stays as it is in the source. InternLM2's {"type": "dynamic"} changes nothing up to
max_position_embeddings; a TensorRT-LLM 0.21 checkpoint that another tool makes from this directory
must have `rotary_scaling` set to null, or long prompts get wrong positions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from export.output_directory import check_disk, output_directory
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import llm_shapes
from internvl_triton.errors import InternVLTritonError
from internvl_triton.model_spec import ModelSpec
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
# How and where somebody ran the model, not what it is; `auto_map` is written anew.
_DROPPED = ("_name_or_path", "attn_implementation", "_attn_implementation_autoset", "auto_map")
_HOLDS = (
    r"(config|generation_config)\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|"
    + ("|".join(name.replace(".", r"\.") for name in (*_TOKENIZER_FILES, *_CODE_FILES)))
)


def export_hf_llm(checkpoint_dir: Path, output_dir: Path, *, progress: bool = True) -> Path:
    """Write config.json, generation_config.json, tokenizer files and safetensors; return the path.

    There are as many shards as hold language model tensors in the source. generation_config.json
    ends answers at <|im_end|>, as the reference's `chat()` does. InternLM2 also needs its modeling
    files, which are copied if the checkpoint has them. The directory appears whole or not at all;
    an older one is replaced.

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
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by file of the source
    for name, shape in shapes.items():
        layout = shards.setdefault(checkpoint.shard(name), {})
        layout[name.removeprefix(PREFIX)] = (checkpoint.dtype(name), shape)
    check_disk(output_dir, sum(map(num_bytes, shards.values())))
    with output_directory(output_dir, holds=_HOLDS) as unfinished:
        _copy(checkpoint_dir, unfinished, (*_TOKENIZER_FILES, *_CODE_FILES))
        has_code = all((unfinished / name).is_file() for name in _CODE_FILES[:2])
        _write_json(unfinished / "config.json", _config(source, spec, has_code=has_code))
        generation = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id is not None:
            generation["bos_token_id"] = tokenizer.bos_id
        _write_json(unfinished / "generation_config.json", generation)
        _write_shards(checkpoint, unfinished, list(shards.values()), progress=progress)
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


def _write_shards(
    checkpoint: Checkpoint,
    directory: Path,
    shards: list[Layout],
    *,
    progress: bool,
) -> None:
    from tqdm import tqdm

    weight_map: dict[str, str] = {}
    with tqdm(
        total=sum(map(num_bytes, shards)),
        unit="B",
        unit_scale=True,
        desc="language model",
        disable=not progress,
    ) as bar:
        for number, layout in enumerate(shards, start=1):
            file = (
                _SINGLE
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            with SafetensorsWriter(directory / file, layout, metadata=_METADATA) as writer:
                for name in layout:
                    tensor = checkpoint.read(PREFIX + name)
                    writer.write(name, tensor)
                    bar.update(tensor.nbytes)
                    weight_map[name] = file
    if len(shards) > 1:
        total = {"total_size": sum(map(num_bytes, shards))}
        _write_json(directory / _INDEX, {"metadata": total, "weight_map": weight_map})


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    try:
        output = export_hf_llm(args.checkpoint, args.output)
    except InternVLTritonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
