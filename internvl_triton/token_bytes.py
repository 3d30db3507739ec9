"""Token ids to the bytes they stand for, without state.

Both tokenizer families give every token fixed bytes: byte-level BPE spells each byte as one
printable character, SentencePiece with byte fallback spells a space as "▁" and a lone byte as
"<0xE4>". So an answer is the concatenation of its tokens' bytes, chunk by chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["BYTE_TO_UNICODE", "TokenBytes", "byte_level_bytes", "sentencepiece_bytes"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable latin-1 bytes stand for themselves, the rest move to 256+."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


BYTE_TO_UNICODE = _byte_to_unicode()
_UNICODE_TO_BYTE = {char: byte for byte, char in BYTE_TO_UNICODE.items()}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token; text outside the alphabet stands for its UTF-8."""
    if all(char in _UNICODE_TO_BYTE for char in token):
        return bytes(_UNICODE_TO_BYTE[char] for char in token)
    return token.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: "▁" is a space, "<0xE4>" one byte."""
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


class TokenBytes:
    """Table token id -> bytes. Special tokens and ids outside the vocabulary give b""."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = tuple(table)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < len(self._table) else b""

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of an answer; may begin or end inside a UTF-8 character."""
        return b"".join(self[token_id] for token_id in token_ids)
