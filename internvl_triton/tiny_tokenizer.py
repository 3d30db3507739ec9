"""Small tokenizers in the two file formats of the published checkpoints.

Qwen2 sizes ship a byte-level BPE (`vocab.json`, `merges.txt`), InternLM2 sizes a SentencePiece
model (`tokenizer.model`). Both are written here with the same chat and image tokens, in the
order of the published vocabularies, padded with letter pairs to the wanted size.
"""

from __future__ import annotations

import json
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from internvl_triton.model_spec import LLMFamily
from internvl_triton.token_bytes import BYTE_TO_UNICODE

__all__ = ["IMAGE_TOKENS", "write_tiny_tokenizer"]

IMAGE_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
_QWEN2_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNLM2_CHAT = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
_WORDS = """
    system user assistant the image picture describe shortly detail what which where how many
    is are in on of and a an left right top bottom color shape number two three Image Frame
    red green blue yellow purple orange circle square triangle star please this that
""".split()  # noqa: SIM905


def write_tiny_tokenizer(directory: Path, *, family: LLMFamily, vocab_size: int) -> None:
    """Write tokenizer files of exactly `vocab_size` entries. Raises ValueError if too few."""
    if family == "qwen2":
        _write_qwen2(directory, vocab_size)
    else:
        _write_internlm2(directory, vocab_size)


def _merges(limit: int) -> list[tuple[str, str]]:
    """BPE merges: common words built left to right, then letter pairs, then pairs of rare bytes."""
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        for text in (word, " " + word):
            symbols = [BYTE_TO_UNICODE[byte] for byte in text.encode()]
            left = symbols[0]
            for right in symbols[1:]:
                merges[left, right] = None
                left += right
    rare = [BYTE_TO_UNICODE[byte] for byte in range(128, 256)]
    for pair in chain(product(ascii_lowercase, ascii_lowercase), product(rare, rare)):
        merges[pair] = None
    return list(merges)[:limit]


def _write_qwen2(directory: Path, vocab_size: int) -> None:
    added = _QWEN2_CHAT + IMAGE_TOKENS
    num_merges = vocab_size - 256 - len(added)
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is below {256 + len(added)}")
    merges = _merges(num_merges)
    vocab = {BYTE_TO_UNICODE[byte]: byte for byte in range(256)}
    for left, right in merges:
        # Different merge paths can spell one token; the filler keeps ids dense and unique.
        token = left + right
        vocab[token if token not in vocab else f"[unused{len(vocab)}]"] = len(vocab)
    base = len(vocab)
    _dump(directory / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_added(
        directory,
        {token: base + i for i, token in enumerate(added)},
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def _write_internlm2(directory: Path, vocab_size: int) -> None:
    from sentencepiece import sentencepiece_model_pb2 as sp

    model = sp.ModelProto()
    piece_type = sp.ModelProto.SentencePiece
    model.trainer_spec.model_type = sp.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False

    def add(piece: str, kind: Any = piece_type.NORMAL) -> None:
        model.pieces.add(piece=piece, score=-float(len(model.pieces)), type=kind)

    add("<unk>", piece_type.UNKNOWN)
    add("<s>", piece_type.CONTROL)
    add("</s>", piece_type.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", piece_type.BYTE)
    num_normal = vocab_size - len(model.pieces) - len(_INTERNLM2_CHAT) - len(IMAGE_TOKENS)
    pieces = _sentencepiece_pieces()
    if num_normal < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small for an InternLM2 tokenizer")
    pairs = [left + right for left, right in product(ascii_lowercase, ascii_lowercase)]
    codes = chain(range(0x4E00, 0xD800), range(0xE000, 0x110000))  # between them are no characters
    rare = [chr(code) for code in islice(codes, num_normal)]
    for piece in list(dict.fromkeys(pieces + pairs + rare))[:num_normal]:
        add(piece)
    first_chat = len(model.pieces)
    for index in range(len(_INTERNLM2_CHAT)):
        add(f"[UNUSED_TOKEN_{141 + index}]", piece_type.USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    added |= {token: first_chat + i for i, token in enumerate(_INTERNLM2_CHAT + IMAGE_TOKENS)}
    _write_added(
        directory,
        added,
        tokenizer_class="InternLM2Tokenizer",
        eos_token="</s>",
        pad_token="</s>",
        bos_token="<s>",
    )


def _sentencepiece_pieces() -> list[str]:
    """Printable characters, then the common words' prefixes, shortest merges first."""
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    prefixes: dict[str, None] = {}
    for word in _WORDS:
        for text in (word, "▁" + word):
            prefixes.update(dict.fromkeys(text[:end] for end in range(2, len(text) + 1)))
    return characters + sorted(prefixes, key=lambda piece: (len(piece), piece))


def _write_added(directory: Path, added: dict[str, int], **config: str) -> None:
    decoder = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in added.items()
    }
    _dump(directory / "added_tokens.json", added)
    _dump(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder, **config})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
