"""The checkpoint's tokenizer, split into what is safe for user text and what is the template's.

Qwen2 sizes ship a byte-level BPE (`vocab.json` + `merges.txt`, some fine-tunes only
`tokenizer.json`), InternLM2 sizes a SentencePiece model (`tokenizer.model`). The encoder below
knows no special token, so text can never turn into one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_triton.errors import ForbiddenToken, IncompleteCheckpoint, InvalidCheckpoint
from internvl_triton.prompt import IM_END, TEMPLATE_TOKENS
from internvl_triton.token_bytes import TokenBytes, byte_level_bytes, sentencepiece_bytes

__all__ = ["Tokenizer", "load_tokenizer"]

# Qwen2's pre-tokenizer: transformers/models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Grounding markup that people write in questions, as the model card's sister tasks do. It can
# neither end a turn nor take a picture's place.
_MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


class Tokenizer:
    """One vocabulary. Satisfies `prompt.PromptTokenizer`."""

    def __init__(
        self,
        *,
        encode_plain: Callable[[str], list[int]],
        pieces: dict[int, bytes],
        added: dict[str, int],
        special: set[str],
        bos_id: int | None,
        pad_id: int | None,
    ) -> None:
        """
        encode_plain: ids of text in which no added token is recognised.
        pieces: id -> bytes of every ordinary token.
        added, special: added tokens by content; those never shown in an answer.
        """
        missing = [token for token in TEMPLATE_TOKENS if token not in added]
        if missing:
            raise InvalidCheckpoint(
                f"the tokenizer has no {', '.join(missing)}: not an InternVL2.5 tokenizer"
            )
        self._encode_plain = encode_plain
        self._added = added
        self._special_ids = frozenset(added[token] for token in special)
        self.bos_id = bos_id
        self.end_id = added[IM_END]
        self.pad_id = self.end_id if pad_id is None else pad_id
        markup = [token for token in added if token in _MARKUP or token not in special]
        self._markup = re.compile("(" + "|".join(map(re.escape, markup)) + ")") if markup else None
        self.token_bytes = _byte_table(pieces, added, special)

    def __len__(self) -> int:
        return len(self.token_bytes)

    def special_id(self, token: str) -> int:
        """Id of an added token such as "<|im_end|>"."""
        return self._added[token]

    def encode(self, text: str) -> list[int]:
        """Ids of user text; grounding markup such as `<ref>` keeps its own id.

        Raises ForbiddenToken when the text spells a token of the template, in any way that this
        vocabulary reads as one.
        """
        for token in TEMPLATE_TOKENS:
            if token in text:
                raise ForbiddenToken(
                    f"the text contains {token!r}, which marks turns and pictures in the prompt; "
                    "remove it or write it differently, for example with a space inside"
                )
        ids: list[int] = []
        for stretch in self._markup.split(text) if self._markup else [text]:
            if stretch in self._added and self._markup and self._markup.fullmatch(stretch):
                ids.append(self._added[stretch])
            elif stretch:
                ids += self._checked(self._encode_plain(stretch), stretch)
        return ids

    def encode_verbatim(self, text: str) -> list[int]:
        """Ids of text in which nothing is markup or forbidden, as a model would write it."""
        return self._encode_plain(text)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        # A SentencePiece vocabulary can spell a chat token as an ordinary piece
        # ("[UNUSED_TOKEN_145]"), which would end a turn from inside user text.
        found = self._special_ids.intersection(ids)
        if found:
            names = [name for name, index in self._added.items() if index in found]
            raise ForbiddenToken(
                f"the text {text[:40]!r} spells the special token {names[0]!r} of this "
                "vocabulary; remove it"
            )
        return ids


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises IncompleteCheckpoint when its files are missing, InvalidCheckpoint when broken.
    """
    directory = Path(directory)
    config = _read_json(directory / "tokenizer_config.json", default={})
    added, special = _added_tokens(directory, config)
    if (directory / "tokenizer.model").is_file():
        return _sentencepiece(directory / "tokenizer.model", config, added, special)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _byte_level(directory, config, added, special)
    if (directory / "tokenizer.json").is_file():
        return _fast(directory / "tokenizer.json", config, added, special)
    raise IncompleteCheckpoint(
        f"{directory} has no tokenizer: neither tokenizer.model (InternLM2), nor vocab.json and "
        "merges.txt (Qwen2), nor tokenizer.json"
    )


def _added_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, int], set[str]]:
    added: dict[str, int] = dict(_read_json(directory / "added_tokens.json", default={}))
    special = set(added)
    try:
        for index, entry in config.get("added_tokens_decoder", {}).items():
            content = entry["content"]
            added[content] = int(index)
            if entry.get("special", False):
                special.add(content)
            else:
                special.discard(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(
            f"tokenizer_config.json has no readable added_tokens_decoder: {error!r}"
        ) from error
    for content, index in added.items():
        if type(index) is not int or index < 0:
            raise InvalidCheckpoint(f"the added token {content!r} has id {index!r}: not an id")
    return added, special


def _byte_level(
    directory: Path, config: dict[str, Any], added: dict[str, int], special: set[str]
) -> Tokenizer:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    vocab = _read_json(directory / "vocab.json")
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and line[:8] != "#version"]
        fast = FastTokenizer(BPE(vocab=vocab, merges=merges))  # type: ignore[arg-type]
    except Exception as error:  # tokenizers has none of its own
        raise InvalidCheckpoint(
            f"vocab.json and merges.txt are not a byte-level BPE: {_first_line(error)}"
        ) from error
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces = {index: byte_level_bytes(token) for token, index in vocab.items()}
    return _from_fast(fast, pieces, config, added, special)


def _fast(
    path: Path, config: dict[str, Any], added: dict[str, int], special: set[str]
) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    described = _read_json(path)
    for entry in described.get("added_tokens", []):
        added.setdefault(entry["content"], entry["id"])
        if entry.get("special", False):
            special.add(entry["content"])
    # Without its added tokens the tokenizer cannot find them in text.
    try:
        fast = FastTokenizer.from_str(json.dumps({**described, "added_tokens": []}))
    except Exception as error:  # tokenizers has none of its own
        raise InvalidCheckpoint(f"{path.name} is not a tokenizer: {_first_line(error)}") from error
    pieces = {index: byte_level_bytes(token) for token, index in fast.get_vocab().items()}
    return _from_fast(fast, pieces, config, added, special)


def _from_fast(
    fast: Any,
    pieces: dict[int, bytes],
    config: dict[str, Any],
    added: dict[str, int],
    special: set[str],
) -> Tokenizer:
    def encode_plain(text: str) -> list[int]:
        ids: list[int] = fast.encode(text, add_special_tokens=False).ids
        return ids

    return Tokenizer(
        encode_plain=encode_plain,
        pieces=pieces,
        added=added,
        special=special,
        bos_id=None,
        pad_id=added.get(_token_text(config.get("pad_token"))),
    )


def _sentencepiece(
    path: Path, config: dict[str, Any], added: dict[str, int], special: set[str]
) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InvalidCheckpoint(f"{path.name} is not a SentencePiece model: {error}") from error
    pieces = {
        index: sentencepiece_bytes(model.id_to_piece(index))
        for index in range(model.get_piece_size())
        if not (model.is_control(index) or model.is_unknown(index))
    }
    for token, index in (("<s>", model.bos_id()), ("</s>", model.eos_id())):
        if index >= 0 and token not in added:
            added[token] = index
            special.add(token)

    def encode_plain(text: str) -> list[int]:
        ids: list[int] = model.encode(text)
        return ids

    return Tokenizer(
        encode_plain=encode_plain,
        pieces=pieces,
        added=added,
        special=special,
        bos_id=model.bos_id() if config.get("add_bos_token", True) else None,
        pad_id=added.get(_token_text(config.get("pad_token"))),
    )


def _byte_table(pieces: dict[int, bytes], added: dict[str, int], special: set[str]) -> TokenBytes:
    size = 1 + max([*pieces, *added.values()])
    table = [b""] * size
    for index, piece in pieces.items():
        table[index] = piece
    for token, index in added.items():
        table[index] = b"" if token in special else token.encode()
    return TokenBytes(table)


def _token_text(value: Any) -> str:
    """A token in tokenizer_config.json: a string or {"content": ...}."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidCheckpoint(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint(f"{path.name} holds no JSON object")
    return values


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
