"""LoRA-trained checkpoints of InternVL's training code: their names, and merging one weight.

`InternVLChatModel.wrap_llm_lora` and `wrap_backbone_lora` (OpenGVLab/InternVL @ 2410d1d) put PEFT
around a tower and save it so: of `language_model.model.layers.0.self_attn.q_proj.weight` (out, in)
come, behind `language_model.base_model.model.model.layers.0.self_attn.q_proj.`,

    base_layer.weight      W (out, in); peft before 0.6 wrote `weight`
    lora_A.default.weight  A (r, in)
    lora_B.default.weight  B (out, r)

and `vision_model.encoder...` becomes
`vision_model.base_model.model.encoder...`. Always lora_alpha = 2 * r, so the merged weight is
W + lora_alpha / r * B A = W + 2 B A (peft's `LoraLayer`, `merge_and_unload`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LORA_SCALE", "TOWERS", "Stored", "merged", "stored_names"]

LORA_SCALE = 2.0  # lora_alpha / r
TOWERS = {"language_model.": "use_llm_lora", "vision_model.": "use_backbone_lora"}
_WRAPPED = re.compile(r"(language_model|vision_model)\.base_model\.model\.(.+)")
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Stored:
    """Where one tensor of the plain layout is: its own name in the files, and its adapter's."""

    base: str
    lora_a: str | None = None
    lora_b: str | None = None


def stored_names(names: Iterable[str]) -> dict[str, Stored]:
    """Plain name -> what holds it, for all names of a checkpoint.

    Raises ValueError naming a tensor that is no LoRA of the training code.
    """
    bases: dict[str, str] = {}
    adapters: dict[str, dict[str, str]] = {}
    for name in names:
        wrapped = _WRAPPED.fullmatch(name)
        plain = f"{wrapped[1]}.{wrapped[2]}" if wrapped else name
        adapter = _ADAPTER.fullmatch(plain)
        if adapter:
            adapters.setdefault(f"{adapter[1]}.weight", {})[adapter[2]] = name
        elif ".lora_" in plain:
            raise ValueError(f"{name} belongs to another kind of adapter than lora_A and lora_B")
        else:
            bases[plain.replace(".base_layer.", ".")] = name
    for plain, halves in adapters.items():
        if plain not in bases or set(halves) != {"A", "B"}:
            raise ValueError(
                f"{next(iter(halves.values()))} lacks its other half or the weight that it adapts"
            )
    return {
        plain: Stored(base, adapters[plain]["A"], adapters[plain]["B"])
        if plain in adapters
        else Stored(base)
        for plain, base in bases.items()
    }


def merged(base: NDArray[Any], lora_a: NDArray[Any], lora_b: NDArray[Any]) -> NDArray[Any]:
    """W + 2 B A in the dtype of W, rounded once from float32.

    base (out, in), lora_a (r, in), lora_b (out, r). In blocks of rows: besides the result, memory
    is one block and A in float32.
    """
    result = np.empty_like(base)
    right = LORA_SCALE * lora_a.astype(np.float32)
    rows = max(1, _BLOCK_BYTES // (4 * base.shape[1]))
    for start in range(0, len(base), rows):
        block = slice(start, start + rows)
        added = lora_b[block].astype(np.float32) @ right
        result[block] = (base[block].astype(np.float32) + added).astype(base.dtype)
    return result
