"""An OpenAI endpoint's stream of events, read into the record of its request.

Server-sent events as the HTML standard defines them (section 9.2.6): lines end with LF, CRLF or CR,
an event with an empty line; what begins with another field than `data` is passed over.
"""

from __future__ import annotations

import codecs
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.records import RequestRecord

__all__ = ["read_answer"]


async def read_answer(pieces: AsyncIterator[bytes], record: RequestRecord, text: list[str]) -> None:
    """Fill the record and the answer's text; pieces: cut anywhere by the network.

    Reasoning that an endpoint sends apart from the answer counts in the times, because it counts in
    the output tokens, and is no part of the text. An answer ends with [DONE]; whatever the endpoint
    does after that belongs to no request.

    What is no such stream becomes the record's error: "error event", "bad event" (no JSON, or of
    another shape) or "cut off" (no [DONE]). Tokens that the endpoint does not count are None.
    """
    counted = False
    async for arrived, data in _events(pieces):
        if data == "[DONE]":
            record.ended_s = arrived
            break
        try:
            event = json.loads(data)
            if event.get("error"):
                record.error, record.message = "error event", str(event["error"])[:500]
                return
            _note_choices(event, arrived, record, text)
            counted |= _note_usage(event, record)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            record.error, record.message = "bad event", f"{error} in {data[:400]!r}"
            return
    if not record.ended_s:
        record.error, record.message = "cut off", "the stream ended without [DONE]"
    elif not counted:
        record.input_tokens = record.output_tokens = None


def _note_choices(
    event: dict[str, Any], arrived: float, record: RequestRecord, text: list[str]
) -> None:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        content = delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if not isinstance(content, str) or not isinstance(thought, str):
            raise TypeError("a delta that is no text")
        if content or thought:  # an event with a role only is no text
            record.chunks_s.append(arrived)
            text.append(content)
        record.finish_reason = choice.get("finish_reason") or record.finish_reason


def _note_usage(event: dict[str, Any], record: RequestRecord) -> bool:
    usage = event.get("usage")
    if not usage:
        return False
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError("a usage without counts")
    record.input_tokens, record.output_tokens = counts
    return True


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, str]]:
    """(arrival of its end, data) of every event that has data."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    rest, data = "", list[str]()
    async for piece in pieces:
        arrived = time.perf_counter()
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        for line in lines:
            if line.startswith("data:"):
                data.append(line.removeprefix("data:").removeprefix(" "))
            elif not line and data:
                yield arrived, "\n".join(data).strip()
                data.clear()
    if rest.startswith("data:"):
        data.append(rest.removeprefix("data:"))
    if data:  # the last one may lack its empty line
        yield time.perf_counter(), "\n".join(data).strip()
