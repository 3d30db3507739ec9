"""An answer in OpenAI's form, whole; its parts are those of the streamed form too."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.engine import Engine
from internvl_triton.client import Answer, Chunk

__all__ = ["Head", "completion", "log_probs", "usage"]


@dataclass(frozen=True)
class Head:
    """What all parts of one answer begin with."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def completion(
    engine: Engine, head: Head, answers: Sequence[Answer], *, logprobs: bool
) -> dict[str, Any]:
    """logprobs: whether they were asked for."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": await log_probs(engine, answer) if logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {**head.fields("chat.completion"), "choices": choices, "usage": usage(answers)}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens as the service counted them; the prompt of several answers counts once."""
    prompt = max(answer.num_input_tokens for answer in answers)
    answered = sum(answer.num_output_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
    }


async def log_probs(engine: Engine, part: Answer | Chunk) -> dict[str, Any]:
    """One entry per token. A piece of a character shows as U+FFFD; its bytes tell."""
    # Without top_logprobs there is nothing in the one and a row per token in the other.
    rows = part.top_log_probs or [{}] * len(part.token_ids)
    wanted = [*part.token_ids, *(token for row in rows for token in row)]
    spelled = dict(zip(wanted, await engine.token_bytes(wanted), strict=True))

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = spelled[token]
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }

    content = [
        {
            **entry(token, logprob),
            "top_logprobs": [entry(other, value) for other, value in row.items()],
        }
        for token, logprob, row in zip(part.token_ids, part.log_probs, rows, strict=True)
    ]
    return {"content": content, "refusal": None}
