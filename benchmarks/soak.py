"""Many streams for minutes: is every answer the one that its request gets alone, is memory flat?

    python -m benchmarks.soak --minutes 10

First each request is asked alone. Then `--streams` callers ask them over and over, text, pictures
and clips mixed, greedily, and compare. Meanwhile the resident memory of every process of the
server is noted; its slope is a least-squares line through all samples but the first quarter.
Ends with 1 when a request failed or an answer differed.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.option_types import at_least
from benchmarks.pictures import clip, jpeg, tiled_size
from benchmarks.running_service import running_service
from internvl_triton.client import Answer, AsyncClient
from internvl_triton.errors import InternVLTritonError
from internvl_triton.program import program

__all__ = ["Soak", "mixed_requests", "report", "slope_per_minute", "soak"]

PAGE_BYTES = 4096
SAMPLE_S = 1.0
TIMEOUT_S = 600.0
Question = dict[str, Any]
Expected = tuple[tuple[int, ...], str, int]


@dataclass
class Soak:
    """What happened. rss: process name -> [(seconds, bytes)]; errors: kind -> number."""

    answers: int = 0
    chunks: int = 0
    mismatches: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    rss: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    duration_s: float = 0.0


def mixed_requests(count: int = 16) -> list[Question]:
    """Half of them text, the others about a picture of 1, 3 or 5 tiles or a clip of 4 frames."""
    media: list[Question] = [
        {},
        {"images": [jpeg(*tiled_size(1), seed=0)]},
        {},
        {"images": [jpeg(*tiled_size(3), seed=1)]},
        {},
        {"videos": [clip(4, 0)], "num_frames": 4},
        {},
        {"images": [jpeg(*tiled_size(1), seed=2), jpeg(*tiled_size(3), seed=3)]},
    ]
    return [
        {
            "prompt": f"Question {number}: what is in the picture?",
            "max_tokens": 4 + 3 * (number % 5),
            "min_tokens": 4 + 3 * (number % 5),
            **media[number % len(media)],
        }
        for number in range(count)
    ]


async def soak(url: str, *, streams: int, duration_s: float, process_id: int | None = None) -> Soak:
    """Run it against the service at `url`. process_id: of the server, if it runs here.

    Raises InternVLTritonError when a request fails that is asked alone.
    """
    found = Soak()
    requests = mixed_requests()
    async with AsyncClient(url, timeout_s=TIMEOUT_S) as client:
        expected = []
        for request in requests:
            answer = Answer()
            expected.append(_what_counts(await _ask(client, request, answer), answer))
        started = time.monotonic()

        async def caller(place: int) -> None:
            turn = place
            while time.monotonic() - started < duration_s:
                number = turn % len(requests)
                turn += 1 + place % 3  # so that neighbours change
                await _compare(client, requests[number], expected[number], found)

        sampler = asyncio.create_task(_sample(process_id, started, found.rss))
        try:
            await asyncio.gather(*(caller(place) for place in range(streams)))
        finally:
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)
        found.duration_s = time.monotonic() - started
    return found


async def _compare(client: AsyncClient, request: Question, expected: Expected, found: Soak) -> None:
    answer = Answer()
    try:
        pieces = await _ask(client, request, answer)
    except InternVLTritonError as error:
        found.errors[type(error).__name__] += 1
        return
    found.answers += 1
    found.chunks += len(pieces)
    given = _what_counts(pieces, answer)
    if given != expected:
        found.mismatches.append(f"{request['prompt']}: {given}, alone {expected}")


async def _ask(client: AsyncClient, request: Question, answer: Answer) -> list[Any]:
    question = {key: value for key, value in request.items() if key != "prompt"}
    return [chunk async for chunk in client.stream(request["prompt"], answer=answer, **question)]


def _what_counts(pieces: Sequence[Any], answer: Answer) -> Expected:
    """Ids and text as their chunks came: a lost or reordered one shows."""
    ids = tuple(token for piece in pieces for token in piece.token_ids)
    return ids, "".join(piece.text for piece in pieces), answer.num_input_tokens


async def _sample(
    process_id: int | None, started: float, rss: dict[str, list[tuple[float, int]]]
) -> None:
    while process_id is not None:
        for name, size in _memory(process_id).items():
            rss[name].append((time.monotonic() - started, size))
        await asyncio.sleep(SAMPLE_S)


def _memory(root: int) -> dict[str, int]:
    """Name -> resident bytes of `root`'s descendants; Python models are named after their model."""
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for process in sorted(family - {root}):
        try:
            arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue
        found[f"{_name(arguments)} ({process})"] = pages * PAGE_BYTES
    return found


def _name(arguments: Sequence[bytes]) -> str:
    program = Path(arguments[0].decode(errors="replace")).name
    for argument in arguments[1:]:
        path = Path(argument.decode(errors="replace"))
        if path.name == "model.py":
            return path.parts[-3]
    return program


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (seconds, value), in units per minute.

    Formula: sum((t - mean t) (v - mean v)) / sum((t - mean t)^2). Below two samples: 0.
    """
    if len(samples) < 2:
        return 0.0
    mean_t = sum(t for t, _ in samples) / len(samples)
    mean_v = sum(v for _, v in samples) / len(samples)
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return 60.0 * sum((t - mean_t) * (v - mean_v) for t, v in samples) / spread


def report(found: Soak, streams: int) -> str:
    errors = ", ".join(f"{kind} {n}" for kind, n in sorted(found.errors.items())) or "none"
    lines = [
        f"{streams} streams for {found.duration_s:.0f} s: {found.answers} answers, "
        f"{found.chunks} chunks, errors: {errors}, answers other than alone: "
        f"{len(found.mismatches)}",
        *found.mismatches[:5],
    ]
    rows = [["process", "RSS at the start, MB", "at the end, MB", "slope, MB/min"]]
    for name, samples in sorted(found.rss.items()):
        settled = samples[len(samples) // 4 :]
        rows.append(
            [
                name,
                f"{samples[0][1] / 1e6:.1f}",
                f"{samples[-1][1] / 1e6:.1f}",
                f"{slope_per_minute(settled) / 1e6:+.3f}",
            ]
        )
    return "\n".join([*lines, "", markdown_table(rows)] if found.rss else lines)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="demo", help="name or directory (%(default)s)")
    parser.add_argument("--server", help="host:port of a running one; its memory is not seen")
    parser.add_argument("--minutes", type=float, default=10.0, help="(%(default)s)")
    parser.add_argument("--streams", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    with running_service(args.model, server=args.server, artifacts_dir=args.artifacts) as service:
        found = asyncio.run(
            soak(
                service.grpc_url,
                streams=args.streams,
                duration_s=60 * args.minutes,
                process_id=service.process_id,
            )
        )
    print(report(found, args.streams))
    return 1 if found.errors or found.mismatches or not found.answers else 0


if __name__ == "__main__":
    raise SystemExit(main())
