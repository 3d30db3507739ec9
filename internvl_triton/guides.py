"""Answers that must have a form: JSON of a schema, a regular expression, one of some choices.

On the CPU llguidance says at each step which tokens may follow; on the GPU TensorRT-LLM's xgrammar
does. Both are given the same two tensors. (xgrammar's package for Python cannot be had without
torch; llguidance depends on nothing, and checks guides in preprocessing in both profiles.)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import EngineError, InvalidSampling
from internvl_triton.sampling import SamplingParams
from internvl_triton.token_bytes import BYTE_TO_UNICODE
from internvl_triton.tokenizer import Tokenizer

__all__ = [
    "Guide",
    "GuideCompiler",
    "GuideMatcher",
    "requested_guide",
    "xgrammar_tokenizer_info",
]

# Between the parts of JSON. Without an end a model can go on with white space for ever.
_JSON_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,20}"
_REGEX_CHARACTERS = frozenset("\\.^$|?*+()[]{}")


@dataclass(frozen=True)
class Guide:
    """What TensorRT-LLM 0.21 calls `guided_decoding_guide_type` and `guided_decoding_guide`."""

    guide_type: str  # "json_schema" or "regex"
    guide: str

    @classmethod
    def from_json_schema(cls, schema: dict[str, Any]) -> Guide:
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Guide:
        """A regular expression of the texts as they are, in the syntax of all engines."""
        escaped = (
            "".join(f"\\{char}" if char in _REGEX_CHARACTERS else char for char in text)
            for text in choices
        )
        return cls("regex", "|".join(f"({text})" for text in escaped))

    def check(self, name: str) -> None:
        """Raises InvalidSampling naming `sampling_parameters.<name>` if it cannot be enforced."""
        from llguidance import LLMatcher

        try:
            problem = LLMatcher.validate_grammar(self._grammar())
        except ValueError as error:
            problem = str(error)
        if problem:
            raise InvalidSampling(
                f"sampling_parameters.{name} cannot be enforced: {_short(problem)}"
            )

    def _grammar(self) -> str:
        """In llguidance's own language. Raises ValueError for an unknown type or broken JSON."""
        from llguidance import LLMatcher

        if self.guide_type == "json_schema":
            options: Any = {"whitespace_pattern": _JSON_WHITE_SPACE}
            return LLMatcher.grammar_from_json_schema(self.guide, overrides=options)
        if self.guide_type == "regex":
            return LLMatcher.grammar_from_regex(self.guide)
        raise ValueError(
            f"guided_decoding_guide_type is {self.guide_type!r}; the CPU engine has json_schema "
            "and regex"
        )


def requested_guide(sampling: SamplingParams) -> Guide | None:
    """What the keys guided_json, guided_regex and guided_choice ask for; None without them.

    Raises InvalidSampling for what cannot be enforced.
    """
    if sampling.guided_json is not None:
        name, guide = "guided_json", Guide.from_json_schema(sampling.guided_json)
    elif sampling.guided_regex is not None:
        name, guide = "guided_regex", Guide("regex", sampling.guided_regex)
    elif sampling.guided_choice:
        name, guide = "guided_choice", Guide.from_choices(sampling.guided_choice)
    else:
        return None
    guide.check(name)
    return guide


class GuideMatcher:
    """Where one answer is in its guide."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may follow, [vocab_size]: the end id where the answer may end.

        Raises EngineError when the guide has become too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise EngineError(_short(self._matcher.get_error()))
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        """Raises EngineError for a token that is not allowed."""
        if not self._matcher.consume_token(token):
            raise EngineError(f"token {token}: {_short(self._matcher.get_error())}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())


class GuideCompiler:
    """Guides for one vocabulary. Its tables are built when the first guide comes."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        self._vocabulary = tokenizer
        self._vocab_size = vocab_size
        self.end_id = tokenizer.end_id
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def __call__(self, guide: Guide) -> GuideMatcher:
        """Raises InvalidSampling when the guide cannot be enforced."""
        from llguidance import LLMatcher

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._new_tokenizer()
        try:
            matcher = LLMatcher(self._tokenizer, guide._grammar(), log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise InvalidSampling(f"the guide cannot be enforced: {_short(problem)}")
        return GuideMatcher(matcher, self._vocab_size)

    def _new_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._vocabulary, self._vocab_size)
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self._vocab_size)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        table = tokenizer.token_bytes
        self.eos_token_id = tokenizer.end_id
        self.bos_token_id = None
        # Tokens without bytes are special ones; each needs a name of its own.
        self.tokens = [table[i] or f"<special {i}>".encode() for i in range(vocab_size)]
        self.special_token_ids = [i for i in range(vocab_size) if not table[i]]
        self._tokenizer = tokenizer
        self._by_bytes = {table[i]: i for i in reversed(range(vocab_size)) if table[i]}
        self._longest = max(map(len, self._by_bytes))

    def __call__(self, text: bytes) -> list[int]:
        """Text that must come next, in the tokens in which a model would write it."""
        try:
            ids = self._tokenizer.encode_verbatim(text.decode())
        except UnicodeDecodeError:
            ids = []
        if self._tokenizer.token_bytes.join(ids) == text:
            return ids
        # Half a character, or SentencePiece, which puts a space in front: the longest tokens.
        ids = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((size for size in sizes if text[:size] in self._by_bytes), 0)
            if not size:
                break
            ids.append(self._by_bytes[text[:size]])
            text = text[size:]
        return ids


def _short(problem: str) -> str:
    """llguidance's message on one line, without what it says of its own state."""
    return " ".join(problem.split("<backtrace>")[0].split("<state>")[0].split())[:300]


def xgrammar_tokenizer_info(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The JSON that parameter `xgrammar_tokenizer_info_path` of TensorRT-LLM 0.21 names.

    As its `_xgrammar_tokenizer_info` (llmapi/tokenizer.py) makes it of a Hugging Face tokenizer,
    which InternLM2's is not. Both families are spelled as byte-level BPE here: xgrammar needs the
    bytes of each token only, and `tokenizer_str` says how they are spelled. An empty token is
    special: it is never allowed.
    """
    vocabulary = (
        "".join(BYTE_TO_UNICODE[byte] for byte in tokenizer.token_bytes[token])
        for token in range(vocab_size)
    )
    return {
        "encoded_vocab": list(vocabulary),
        "tokenizer_str": json.dumps({"decoder": {"type": "ByteLevel"}}),
        "stop_token_ids": [tokenizer.end_id],
    }
