"""What a dialogue's history costs: TTFT of the second turn against the first, in one run.

Every dialogue has a picture of its own, so its first turn finds nothing. Its second turn comes with
the same picture and the history. As a control the same second turn is asked with another picture of
the same size, of which nothing is known either: all that differs is what was kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.pictures import tiled_size, unique_jpeg
from benchmarks.prometheus import Samples, read_samples
from benchmarks.running_service import Service, running_service
from internvl_triton.client import Answer, Client
from internvl_triton.program import program

__all__ = ["KINDS", "Kind", "main", "measure", "report"]

FIRST, SECOND, CONTROL = KINDS = (
    "turn 1, new picture",
    "turn 2, same picture",
    "turn 2, all new (control)",
)
QUESTIONS = ("Describe the picture in detail.", "Which of these things is the largest, and why?")
ANSWER_TOKENS = 16
WARM_UP = 1  # dialogues; the first run of every engine is slower


@dataclass
class Kind:
    """Requests of one kind. Without metrics computed_tokens and tiles stay empty."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    computed_tokens: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)


def measure(service: Service, *, dialogues: int, num_tiles: int) -> dict[str, Kind]:
    """Name of KINDS -> its requests, one after the other. Raises InternVLTritonError."""
    kinds = {name: Kind() for name in KINDS}
    with Client(service.grpc_url) as client:
        for number in range(WARM_UP + dialogues):
            pictures = [
                unique_jpeg(*tiled_size(num_tiles), 2 * number + other) for other in range(2)
            ]
            into = {name: Kind() for name in KINDS} if number < WARM_UP else kinds
            first = [_user(QUESTIONS[0], with_picture=True)]
            answer = _ask(client, service, first, pictures[0], into[FIRST])
            history = {"role": "assistant", "content": answer.text or "."}
            second = [*first, history, _user(QUESTIONS[1])]
            _ask(client, service, second, pictures[0], into[SECOND])
            _ask(client, service, second, pictures[1], into[CONTROL])
    return kinds


def report(kinds: dict[str, Kind]) -> str:
    """A Markdown table of medians, and the quotients that matter."""
    rows = [["", "TTFT", "prompt tokens", "computed", "tiles encoded"]]
    for name, kind in kinds.items():
        rows.append(
            [
                name,
                f"{median(kind.ttft_s) * 1000:.0f} ms",
                f"{median(kind.prompt_tokens):.0f}",
                f"{median(kind.computed_tokens):.0f}" if kind.computed_tokens else "-",
                f"{median(kind.tiles):g}" if kind.tiles else "-",
            ]
        )
    first, second, control = (median(kinds[name].ttft_s) for name in KINDS)
    return (
        f"{markdown_table(rows)}\n\nMedians of {len(kinds[FIRST].ttft_s)} dialogues. "
        f"Turn 2 begins after {second / first:.0%} of the time of turn 1, "
        f"and after {second / control:.0%} of its own time without reuse."
    )


def _user(text: str, *, with_picture: bool = False) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image"}] if with_picture else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _ask(
    client: Client, service: Service, messages: list[dict[str, Any]], picture: bytes, into: Kind
) -> Answer:
    before = _metrics(service)
    answer = Answer()
    sampling = {"max_tokens": ANSWER_TOKENS, "min_tokens": ANSWER_TOKENS}
    for _ in client.stream(messages, images=[picture], answer=answer, **sampling):
        pass
    if answer.ttft_s is not None:  # an answer can be without any text
        into.ttft_s.append(answer.ttft_s)
    into.prompt_tokens.append(answer.num_input_tokens)
    if before is not None and (after := _metrics(service)) is not None:
        added = after.since(before)
        into.computed_tokens.append(added.sum("internvl_prompt_tokens_total"))
        into.tiles.append(added.sum("internvl_vision_tiles_total"))
    return answer


def _metrics(service: Service) -> Samples | None:
    """None where the counters do not exist: TensorRT-LLM's backend has others."""
    if service.metrics_url is None:
        return None
    samples = read_samples(service.metrics_url)
    return samples if samples.has("internvl_prompt_tokens_total") else None


@program()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a name or a checkpoint directory")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--dialogues", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--tiles", type=int, default=5, help="of a picture: 1, or 3 to 13; default: %(default)s"
    )
    parser.add_argument("--server", help="host:port of the gRPC endpoint of a running service")
    parser.add_argument(
        "--metrics-url", help="of that service, such as http://127.0.0.1:8002/metrics"
    )
    parser.add_argument("--artifacts-dir", type=Path, default=Path("artifacts"))
    arguments = parser.parse_args(argv)
    if arguments.dialogues < 1 or not (arguments.tiles == 1 or 3 <= arguments.tiles <= 13):
        parser.error("--dialogues is at least 1; --tiles is 1, or 3 to 13")
    with running_service(
        arguments.model,
        server=arguments.server,
        metrics_url=arguments.metrics_url,
        tp_size=arguments.tp_size,
        artifacts_dir=arguments.artifacts_dir,
    ) as service:
        kinds = measure(service, dialogues=arguments.dialogues, num_tiles=arguments.tiles)
    print(report(kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
