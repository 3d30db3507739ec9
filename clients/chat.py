"""Ask the running service one question, about a picture or without one, and stream the answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from internvl_triton.client import Answer, Client
from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program

__all__ = ["read_file", "read_image", "summary"]


def read_file(name: str, path: str) -> bytes:
    """The file's bytes. Raises InvalidRequest with `name`=... when it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{name}={path!r} cannot be read: {error.strerror}") from error


def read_image(path: str) -> bytes:
    """As `read_file`, for IMAGE."""
    return read_file("IMAGE", path)


def summary(answer: Answer) -> str:
    """One line: tokens, TTFT and output throughput of this request."""
    parts = [f"{answer.num_input_tokens} + {answer.num_output_tokens} tokens"]
    if answer.ttft_s is not None:
        parts.append(f"TTFT {answer.ttft_s * 1000:.0f} ms")
    if answer.ttft_s is not None and answer.num_output_tokens > 1:
        rate = (answer.num_output_tokens - 1) / max(1e-9, answer.latency_s - answer.ttft_s)
        parts.append(f"{rate:.1f} tokens/s")
    return ", ".join([*parts, f"finish_reason {answer.finish_reason}"])


@program(interrupted="interrupted; the request was stopped on the server")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients.chat", description=__doc__)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", action="append", default=[], help="picture file; may repeat")
    parser.add_argument("--model", help="refuse to ask a server that serves another one")
    parser.add_argument("--grpc-port", type=int, default=8001, help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    args = parser.parse_args(argv)
    answer = Answer()
    with Client(f"{args.host}:{args.grpc_port}") as client:
        served = client.limits().model
        if args.model and Path(args.model).name != served:
            raise InvalidRequest(
                f"the server on port {args.grpc_port} serves {served}, not {args.model}"
            )
        chunks = client.stream(
            args.prompt,
            images=[read_image(path) for path in args.image],
            answer=answer,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
        )
        with contextlib.closing(chunks):
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
    print(f"\n[{summary(answer)}]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
