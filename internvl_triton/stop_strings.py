"""Stop strings, found in an answer's bytes: across tokens, chunks and inside tokens.

TensorRT-LLM compares token ids, and a text can be spelled by many token sequences. So the answer
is searched where its tokens have become bytes, before any of them reaches a caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

__all__ = ["StopRule", "StopScanner"]


@dataclass(frozen=True)
class StopRule:
    """When one answer ends: at a stop string, or after max_tokens tokens.

    An occurrence that is complete before min_tokens tokens does not count. stream: the answer
    comes in several chunks.
    """

    stop: tuple[str, ...]
    min_tokens: int
    max_tokens: int
    stream: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StopRule:
        values = json.loads(text)
        return cls(**{**values, "stop": tuple(values["stop"])})


class StopScanner:
    """Cuts one answer in front of the stop string that is complete first.

    Of several that are complete at the same byte the longest counts. Bytes that can be the
    beginning of a stop string are held back until it is decided.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.stopped = False  # a stop string was found
        self.num_tokens = 0  # up to the one that completed it
        self._stops = [text.encode() for text in rule.stop]
        self._held = b""

    @property
    def ended(self) -> bool:
        """Whether no further chunk can add to the answer."""
        return self.stopped or self.num_tokens >= self.rule.max_tokens

    def feed(self, pieces: Iterable[bytes]) -> tuple[bytes, int]:
        """The bytes to show of a chunk, and how many of its tokens belong to the answer.

        pieces: the bytes of each token. None at all: the answer has ended.
        """
        shown, num_tokens, empty = b"", 0, True
        for piece in pieces:
            empty = False
            if self.ended:
                break
            num_tokens += 1
            self.num_tokens += 1
            shown += self._next(piece)
        if (empty or not self.rule.stream or self.ended) and not self.stopped:
            shown += self._held
            self._held = b""
        return shown, num_tokens

    def _next(self, piece: bytes) -> bytes:
        held, text = self._held, self._held + piece
        if self.num_tokens >= self.rule.min_tokens:
            found = [
                (at + len(stop), at)
                for stop in self._stops
                # ends behind what was held back: that has been searched
                if (at := text.find(stop, max(0, len(held) - len(stop) + 1))) >= 0
            ]
            if found:
                self.stopped, self._held = True, b""
                return text[: min(found)[1]]
        self._held = self._beginning_of_a_stop(text)
        return text[: len(text) - len(self._held)]

    def _beginning_of_a_stop(self, text: bytes) -> bytes:
        """The longest end of `text` that begins a stop string, without being all of it."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(len(text), longest), 0, -1):
            end = text[-size:]
            if any(len(stop) > size and stop.startswith(end) for stop in self._stops):
                return end
        return b""
