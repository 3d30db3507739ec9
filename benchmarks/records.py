"""What is noted of one request while it runs; everything else is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RequestRecord"]


@dataclass
class RequestRecord:
    """Times are seconds of one monotonic clock.

    number: place in the workload. due_s: when it should have been sent, if its time was planned
    (open loop). chunks_s: arrivals of chunks that have text. ended_s: the end of the response, or
    of the attempt. input_tokens, output_tokens: None where an endpoint answered and did not count
    them. error: "" or its kind; a request with an error has no latency. warm_up: sent before the
    load was reached; no metric counts it.
    """

    number: int
    sent_s: float = 0.0
    due_s: float | None = None
    chunks_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    num_images: int = 0
    num_tiles: int = 0
    finish_reason: str = ""
    error: str = ""
    message: str = ""
    warm_up: bool = False
