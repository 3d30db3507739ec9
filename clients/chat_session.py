"""A conversation with the service that remembers its turns: what `chat()`'s history is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl_triton.client import Answer, Client

__all__ = ["ChatSession"]


class ChatSession:
    """Every turn sends the whole conversation with its pictures; the server keeps nothing of it.

    sampling: for every turn, such as max_tokens=256, temperature=0.8.
    """

    def __init__(self, client: Client, **sampling: Any) -> None:
        self.client = client
        self.sampling = sampling
        self.messages: list[dict[str, Any]] = []
        self._images: list[bytes] = []
        self._videos: list[bytes] = []

    def ask(
        self, question: str, *, images: Sequence[bytes] = (), videos: Sequence[bytes] = ()
    ) -> Answer:
        """The answer to the next question, with the pictures that come with it.

        question: may place them with `<image>`. Errors as `Client.generate`, after which the
        conversation is as it was before.
        """
        media = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        turn = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
        answer = self.client.generate(
            [*self.messages, turn],
            images=[*self._images, *images],
            videos=[*self._videos, *videos],
            **self.sampling,
        )
        self.messages += [turn, {"role": "assistant", "content": answer.text}]
        self._images += images
        self._videos += videos
        return answer
