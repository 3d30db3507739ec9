"""One small vocabulary in the two tokenizer formats of the published checkpoints.

Qwen2 layout: byte-level BPE. InternLM2 layout: SentencePiece BPE with byte fallback. Both cut a
text at the same places, so their ids differ only by a fixed table, `Vocabulary.qwen2_id`. The
reason: every piece is made by every pair of pieces that spells it, in one order, which is what
SentencePiece does with scores; and no piece crosses a border of Qwen2's pre-tokenizer, because
it was learned inside those borders. (Chinese text outside the system message can differ: a
byte-level BPE may join the first two bytes of a character, SentencePiece never does.)
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from demo.dialogue import EXAMPLE_KINDS, make_example
from internvl_triton.prompt import DEFAULT_SYSTEM_MESSAGE
from internvl_triton.tiny_tokenizer import IMAGE_TOKENS
from internvl_triton.token_bytes import BYTE_TO_UNICODE

__all__ = ["Vocabulary", "demo_vocabulary", "learn_pieces"]

_QWEN2_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNLM2_CHAT = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
_INTERNLM2_FIRST = ("<unk>", "<s>", "</s>")
# Qwen2's pre-tokenizer: transformers/models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX
_BORDERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """characters: the non-ASCII ones; pieces: longer texts, in the order they are merged."""

    characters: tuple[str, ...]
    pieces: tuple[str, ...]

    @cached_property
    def qwen2_tokens(self) -> list[str]:
        """Tokens by id: bytes, bytes of characters joined, pieces, chat and image tokens."""
        joined = [_bytes_as_text(char)[:end] for char in self.characters for end in (2, 3)]
        pieces = [_bytes_as_text(piece) for piece in self.pieces]
        alphabet = [BYTE_TO_UNICODE[byte] for byte in range(256)]
        return [*dict.fromkeys([*alphabet, *joined, *pieces]), *_QWEN2_CHAT, *IMAGE_TOKENS]

    @cached_property
    def internlm2_tokens(self) -> list[str]:
        """Tokens by id: <unk> <s> </s>, bytes, space, characters, pieces, chat and image tokens."""
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        texts = [" ", *self.characters, *self.pieces]
        return [
            *_INTERNLM2_FIRST,
            *byte_pieces,
            *(text.replace(" ", "▁") for text in texts),
            *_INTERNLM2_CHAT,
            *IMAGE_TOKENS,
        ]

    @cached_property
    def qwen2_id(self) -> list[int | None]:
        """For every InternLM2 id the Qwen2 id of the same token, None where there is none."""
        ids = {token: index for index, token in enumerate(self.qwen2_tokens)}
        table: list[int | None] = []
        for token in self.internlm2_tokens:
            if token == "<0x20>":
                table.append(None)  # a space is the piece "▁"
            elif len(token) == 6 and token.startswith("<0x"):
                table.append(int(token[3:5], 16))
            elif token in ids and token.startswith("<") and token.endswith(">"):
                table.append(ids[token])
            else:
                table.append(ids.get(_bytes_as_text(token.replace("▁", " "))))
        return table

    def write_qwen2(self, directory: Path) -> None:
        """vocab.json, merges.txt, added_tokens.json, tokenizer_config.json."""
        tokens = self.qwen2_tokens
        first_added = len(tokens) - len(_QWEN2_CHAT) - len(IMAGE_TOKENS)
        _dump(directory / "vocab.json", {t: i for i, t in enumerate(tokens[:first_added])})
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges())]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_added(
            directory,
            {token: index for index, token in enumerate(tokens) if index >= first_added},
            tokenizer_class="Qwen2Tokenizer",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        )

    def _merges(self) -> list[tuple[str, str]]:
        known = set(self.qwen2_tokens)
        texts = [_bytes_as_text(char)[:end] for char in self.characters for end in (2, 3)]
        texts += [_bytes_as_text(piece) for piece in self.pieces]
        return [
            (text[:cut], text[cut:])
            for text in dict.fromkeys(texts)
            for cut in range(1, len(text))
            if text[:cut] in known and text[cut:] in known
        ]

    def write_internlm2(self, directory: Path) -> None:
        """tokenizer.model, added_tokens.json, tokenizer_config.json."""
        from sentencepiece import sentencepiece_model_pb2 as sp

        tokens = self.internlm2_tokens
        kinds = sp.ModelProto.SentencePiece
        model = sp.ModelProto()
        model.trainer_spec.model_type = sp.TrainerSpec.BPE
        model.trainer_spec.byte_fallback = True
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        first_chat = len(tokens) - len(_INTERNLM2_CHAT) - len(IMAGE_TOKENS)
        for index, token in enumerate(tokens[: first_chat + len(_INTERNLM2_CHAT)]):
            kind, piece = kinds.NORMAL, token
            if token == "<unk>":
                kind = kinds.UNKNOWN
            elif token in ("<s>", "</s>"):
                kind = kinds.CONTROL
            elif index < len(_INTERNLM2_FIRST) + 256:
                kind = kinds.BYTE
            elif index >= first_chat:
                # The published vocabulary keeps places for the chat tokens under these names.
                kind, piece = kinds.USER_DEFINED, f"[UNUSED_TOKEN_{141 + index - first_chat}]"
            model.pieces.add(piece=piece, score=-float(index), type=kind)
        model.trainer_spec.vocab_size = len(model.pieces)
        (directory / "tokenizer.model").write_bytes(model.SerializeToString())
        _write_added(
            directory,
            {
                token: index
                for index, token in enumerate(tokens)
                if index < len(_INTERNLM2_FIRST) or index >= first_chat
            },
            tokenizer_class="InternLM2Tokenizer",
            eos_token="</s>",
            pad_token="</s>",
            bos_token="<s>",
        )


@lru_cache(maxsize=1)
def demo_vocabulary() -> Vocabulary:
    """The vocabulary of the demo's questions and answers; the same until one of them changes."""
    texts = {"user\n", "assistant\n", *(f"Frame{number}: " for number in range(1, 9))}
    rng = random.Random("vocabulary")
    for kind in EXAMPLE_KINDS:
        for _ in range(300):
            for branch in make_example(rng, kind, tile_size=448).branches:
                texts.update(text for e in branch for text in (e.question, e.answer))
    # Every word counts once, however often it is said: the order depends on the words alone.
    counts = Counter({word for text in texts for word in _words(text)})
    counts.update(dict.fromkeys(_words("system\n" + DEFAULT_SYSTEM_MESSAGE), 1))
    characters = sorted({char for word in counts for char in word if ord(char) > 127})
    return Vocabulary(tuple(characters), tuple(learn_pieces(counts)))


def learn_pieces(counts: Counter[str]) -> list[str]:
    """Texts in the order a BPE joins them until every word is one piece; ties alphabetically."""
    words = {word: list(word) for word in counts}
    pieces: dict[str, None] = {}
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return list(pieces)
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces["".join(best)] = None
        for word, parts in words.items():
            words[word] = _joined(parts, best)


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    """Stretches between the borders of Qwen2's pre-tokenizer."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return tuple(word for word, _ in Split(Regex(_BORDERS), "isolated").pre_tokenize_str(text))


def _bytes_as_text(text: str) -> str:
    return "".join(BYTE_TO_UNICODE[byte] for byte in text.encode())


def _write_added(directory: Path, added: dict[str, int], **config: str) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(i): {"content": t, **flags, "special": True} for t, i in added.items()}
    _dump(directory / "added_tokens.json", added)
    _dump(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder, **config})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
