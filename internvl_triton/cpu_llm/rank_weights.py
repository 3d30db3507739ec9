"""Read a TensorRT-LLM checkpoint, config.json and rank{r}.safetensors, into memory.

Weights become float32, or with `quant_algo` W8A16 / W4A16 integers and scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton.cpu_llm.rank_layout import is_replicated, rank_shapes
from internvl_triton.cpu_llm.weight_only import (
    BITS,
    QuantizedWeight,
    Weight,
    is_quantized,
    quantize,
)
from internvl_triton.errors import ArtifactMismatch, InvalidTensorParallel
from internvl_triton.model_spec import LLMFamily, LLMSpec

__all__ = ["LayerWeights", "RankWeights", "load_ranks"]

Array = NDArray[np.float32]

_FAMILIES: dict[str, LLMFamily] = {
    "Qwen2ForCausalLM": "qwen2",
    "InternLM2ForCausalLM": "internlm2",
}
# What this engine does not compute; another value would silently give another model.
_SUPPORTED: dict[str, Any] = {
    "position_embedding_type": "rope_gpt_neox",
    "hidden_act": "silu",
    "rotary_scaling": None,
    "use_parallel_embedding": False,
    "qk_layernorm": False,
    "mlp_bias": False,
}
_SUPPORTED_QUANTIZATION: dict[str, Any] = {
    "kv_cache_quant_algo": None,
    "exclude_modules": None,
}
_FLOATS = ("bfloat16", "float16", "float32")
_REPAIR = "convert the checkpoint again (python -m export.llm_checkpoint)"


@dataclass(frozen=True)
class LayerWeights:
    """One rank's part of a layer; matrices are (out, in). `fc` is the one that gets the SiLU."""

    input_layernorm: Array
    qkv: Weight  # rows [q; k; v] of this rank's heads
    qkv_bias: Array | None
    dense: Weight
    post_layernorm: Array
    fc: Weight
    gate: Weight
    proj: Weight


@dataclass(frozen=True)
class RankWeights:
    vocab_embedding: NDArray[Any]  # (vocab_size, hidden), as stored: rows are upcast when looked up
    layers: tuple[LayerWeights, ...]
    ln_f: Array
    lm_head: Array  # this rank's rows of the padded vocabulary


def load_ranks(checkpoint_dir: Path) -> tuple[LLMSpec, list[RankWeights]]:
    """The model and the weights of each rank, upcast to float32 or quantised.

    Quantisation sees one rank at a time, as NVIDIA's does: where the inputs of a matrix are divided
    (`dense`, `proj`), every rank has scales of its own, and answers differ a little between TP
    sizes. Tensors that all ranks hold (embedding, norms) are compared, then kept once.

    Raises ArtifactMismatch for a missing or unreadable file, a missing tensor, a wrong shape, or
    a config that this engine cannot execute.
    """
    checkpoint_dir = Path(checkpoint_dir)
    spec, tp_size, bits = _read_config(checkpoint_dir)
    shapes = rank_shapes(spec, tp_size)
    shared: dict[str, NDArray[Any]] = {}
    ranks = []
    for rank in range(tp_size):
        tensors = _read_rank(checkpoint_dir / f"rank{rank}.safetensors", shapes, shared, bits)
        ranks.append(_rank_weights(spec, tensors))
    return spec, ranks


def _read_config(directory: Path) -> tuple[LLMSpec, int, int | None]:
    """The model, tp_size, and the bits of a quantised weight or None."""
    path = directory / "config.json"
    if not path.is_file():
        raise ArtifactMismatch(f"{directory} has no config.json: not a TensorRT-LLM checkpoint")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactMismatch(f"{path} is not valid JSON ({error}); {_REPAIR}") from error
    for key, value in _SUPPORTED.items():
        if config.get(key, value) != value:
            raise ArtifactMismatch(
                f"{path} has {key}={config[key]!r}; the CPU engine executes {value!r} only"
            )
    if config.get("architecture") not in _FAMILIES:
        raise ArtifactMismatch(
            f"{path} has architecture {config.get('architecture')!r}; "
            f"the CPU engine executes {', '.join(_FAMILIES)}"
        )
    try:
        mapping = config["mapping"]
        tp_size = int(mapping["tp_size"])
        quantization = config["quantization"]
        quant_algo = quantization["quant_algo"]
        spec = LLMSpec(
            family=_FAMILIES[config["architecture"]],
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=int(config["num_attention_heads"]),
            num_kv_heads=int(config["num_key_value_heads"]),
            head_dim=int(config["head_size"]),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            rope_theta=float(config["rotary_base"]),
            norm_eps=float(config["norm_epsilon"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
        )
        spec.check_tp_size(tp_size)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactMismatch(f"{path} lacks a usable {error}; {_REPAIR}") from error
    except InvalidTensorParallel as error:
        raise ArtifactMismatch(f"{path}: {error}") from error
    if mapping.get("world_size", tp_size) != tp_size:
        raise ArtifactMismatch(
            f"{path} has world_size {mapping['world_size']} and tp_size {tp_size}; "
            "the CPU engine executes tensor parallelism only"
        )
    if quant_algo is not None and quant_algo not in BITS:
        raise ArtifactMismatch(
            f"{path} has quant_algo {quant_algo!r}; the CPU engine executes null, {', '.join(BITS)}"
        )
    for key, value in _SUPPORTED_QUANTIZATION.items():
        if quantization.get(key, value) != value:
            raise ArtifactMismatch(
                f"{path} has quantization.{key}={quantization[key]!r}; "
                f"the CPU engine executes {value!r} only"
            )
    return spec, tp_size, None if quant_algo is None else BITS[quant_algo]


def _read_rank(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    shared: dict[str, NDArray[Any]],
    bits: int | None,
) -> dict[str, Any]:
    """All tensors of one file: float32 arrays, `QuantizedWeight`s if `bits` is given, and the
    embedding as it is stored. Replicated ones come from `shared`, which rank 0 fills.
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtifactMismatch(f"{path} is missing; {_REPAIR}")
    tensors: dict[str, NDArray[Any] | QuantizedWeight] = {}
    try:
        with safe_open(path, framework="np") as opened:
            missing = shapes.keys() - set(opened.keys())
            if missing:
                raise ArtifactMismatch(
                    f"{path} lacks {len(missing)} of {len(shapes)} tensors, "
                    f"such as {min(missing)}; {_REPAIR}"
                )
            for name, shape in shapes.items():
                tensor = opened.get_tensor(name)
                if tensor.dtype.name not in _FLOATS:
                    raise ArtifactMismatch(
                        f"{path}: {name} is {tensor.dtype.name}, quantised for one kind of GPU; "
                        f"the CPU engine reads {', '.join(_FLOATS)} and quantises them itself; "
                        f"{_REPAIR}"
                    )
                if tensor.shape != shape:
                    raise ArtifactMismatch(
                        f"{path}: {name} has shape {tensor.shape}, config.json implies {shape}; "
                        f"{_REPAIR}"
                    )
                if is_replicated(name):
                    first = shared.setdefault(name, tensor)
                    if first is not tensor and not np.array_equal(first, tensor):
                        raise ArtifactMismatch(
                            f"{path}: {name} differs from rank 0's, but all ranks must hold the "
                            f"same; {_REPAIR}"
                        )
                    tensor = first
                if name.endswith("vocab_embedding.weight"):
                    tensors[name] = tensor
                elif bits is not None and is_quantized(name):
                    tensors[name] = quantize(tensor, bits)
                else:
                    tensors[name] = tensor.astype(np.float32)
    except SafetensorError as error:
        raise ArtifactMismatch(f"{path} is not a complete safetensors file ({error})") from error
    return tensors


def _rank_weights(spec: LLMSpec, tensors: Mapping[str, Any]) -> RankWeights:
    layers = []
    for layer in range(spec.num_layers):
        prefix = f"transformer.layers.{layer}."
        layers.append(
            LayerWeights(
                input_layernorm=tensors[prefix + "input_layernorm.weight"],
                qkv=tensors[prefix + "attention.qkv.weight"],
                qkv_bias=tensors.get(prefix + "attention.qkv.bias"),
                dense=tensors[prefix + "attention.dense.weight"],
                post_layernorm=tensors[prefix + "post_layernorm.weight"],
                fc=tensors[prefix + "mlp.fc.weight"],
                gate=tensors[prefix + "mlp.gate.weight"],
                proj=tensors[prefix + "mlp.proj.weight"],
            )
        )
    return RankWeights(
        vocab_embedding=tensors["transformer.vocab_embedding.weight"],
        layers=tuple(layers),
        ln_f=tensors["transformer.ln_f.weight"],
        lm_head=tensors["lm_head.weight"],
    )
