"""What the HTTP side needs of a service: `internvl_triton.client.AsyncClient`, or a test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from internvl_triton.client import Answer, Chunk, ServerLimits

__all__ = ["Engine"]


class Engine(Protocol):
    """All of it raises InternVLTritonError and nothing else on purpose.

    Whoever stops iterating `stream`, or cancels the task that waits, ends the generation.
    """

    async def limits(self) -> ServerLimits:
        """Which model is served, and its limits."""

    async def is_ready(self) -> bool:
        """Whether requests are taken now."""

    def stream(
        self, prompt: Sequence[dict[str, Any]], *, answer: Answer, **request: Any
    ) -> AsyncIterator[Chunk]:
        """Chunks as they are generated; `answer` holds the counts and the end when it is over."""

    async def generate_n(
        self, prompt: Sequence[dict[str, Any]], n: int, **request: Any
    ) -> list[Answer]:
        """n whole answers, of the seeds seed, seed + 1, ..."""

    async def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """What each token adds to a text."""
