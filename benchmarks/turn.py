"""One request of a load run, as every target takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.records import RequestRecord

__all__ = ["Message", "Turn", "check_length"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """The messages so far and the media of the whole conversation.

    sampling: further `sampling_parameters` of our service, such as max_tiles.
    """

    messages: list[Message]
    max_tokens: int
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


def check_length(record: RequestRecord, max_tokens: int) -> None:
    """Answers of other lengths than asked for would make every comparison wrong."""
    if record.error:
        return
    if record.output_tokens is None:
        record.error = "no usage"
        record.message = (
            "the endpoint does not count tokens (stream_options.include_usage), so nobody knows "
            "whether answers have the length asked for; with --let-stop all but the tokens is "
            "measured"
        )
    elif record.output_tokens != max_tokens:
        record.error = "wrong length"
        record.message = (
            f"{record.output_tokens} tokens instead of {max_tokens}: the endpoint does not know "
            "min_tokens; use --let-stop, or --extra-body with what it knows, such as ignore_eos"
        )
