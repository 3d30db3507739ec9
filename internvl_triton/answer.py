"""An answer and its streamed pieces, on the client's side."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract

__all__ = ["Answer", "AnswerText", "Chunk", "next_chunk"]


@dataclass(frozen=True)
class Chunk:
    """One piece of a streamed answer. `text` never ends inside a character."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[dict[int, float], ...] = ()


@dataclass
class Answer:
    """A whole answer, stripped of white space at both ends as the reference does.

    ttft_s: send to the first chunk with text; None for an answer without text. latency_s: send
    to the last chunk. finish_reason: "stop" when the model or a stop string ended the answer,
    "length" when it used up what it was allowed. token_ids hold a stop string that `text` lacks.
    top_log_probs: of each token, the `top_logprobs` most likely ids, most likely first; before
    temperature and penalties, unlike `log_probs`.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[dict[int, float]] = field(default_factory=list)
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    ttft_s: float | None = None
    latency_s: float = 0.0


class AnswerText:
    """Bytes to text, chunk by chunk: whole characters only, no white space at either end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # trailing white space that may turn out to be inside the answer
        self._started = False

    def feed(self, data: bytes, *, final: bool = False) -> str:
        text = self._held + self._decoder.decode(data, final)
        if not self._started:
            text = text.lstrip()
        stripped = text.rstrip()
        self._started = self._started or bool(stripped)
        self._held = text[len(stripped) :]
        return stripped

    def finish(self) -> str:
        return self.feed(b"", final=True)


def next_chunk(
    response: dict[str, NDArray[Any]], text: AnswerText, answer: Answer, *, top_logprobs: int = 0
) -> Chunk:
    """One response of the ensemble as a chunk, added to `answer`. Log-probs can be missing,
    and num_input_tokens behind the first one.

    top_logprobs: how many alternatives were asked for; the server sends more.
    """
    data = b"".join(response[contract.TEXT_OUTPUT.name].reshape(-1).tolist())

    def rows(tensor: contract.Tensor) -> list[Any]:
        return response[tensor.name].tolist() if tensor.name in response else []

    chunk = Chunk(
        text=text.feed(data),
        token_ids=tuple(response[contract.ANSWER_IDS.name].reshape(-1).tolist()),
        log_probs=tuple(rows(contract.LOG_PROBS)),
        top_log_probs=tuple(
            dict(zip(ids[:top_logprobs], values[:top_logprobs], strict=True))
            for ids, values in zip(
                rows(contract.TOP_TOKEN_IDS), rows(contract.TOP_LOG_PROBS), strict=True
            )
        ),
    )
    answer.text += chunk.text
    answer.token_ids += chunk.token_ids
    answer.log_probs += chunk.log_probs
    answer.top_log_probs += chunk.top_log_probs
    if contract.NUM_INPUT_TOKENS.name in response:
        answer.num_input_tokens = int(response[contract.NUM_INPUT_TOKENS.name].reshape(-1)[0])
    answer.num_output_tokens = len(answer.token_ids)
    return chunk
