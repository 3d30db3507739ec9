"""The demo: build, serve, ask about pictures and a clip, stream the answers, stop the server.

The demo model (demo/MODEL_CARD.md) really sees: every question has one right answer, and the demo
passes only if the service gave it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clients.chat import summary
from internvl_triton.client import Answer, Client
from internvl_triton.program import program
from internvl_triton.triton_server import find_free_port

if TYPE_CHECKING:
    from demo import SampleQuestion

__all__ = ["QUESTIONS"]

READY_TIMEOUT_S = 120.0
MAX_TOKENS = 64
# Of demo/samples/samples.json: a picture, small print in tiles, two pictures, a clip, two turns.
QUESTIONS = (
    "describe",
    "small print",
    "second image",
    "motion",
    "left and right",
    "left and right, turn 2",
    "text",
)


def run_demo(artifacts_dir: Path) -> bool:
    """Print the whole demo; return whether every answer was right."""
    from build import build_engines, make_server
    from demo import sample_questions

    known = {question.name: question for question in sample_questions()}
    print(
        "== 1. Build: checkpoint -> ONNX + TensorRT-LLM checkpoint -> model repository", flush=True
    )
    build_engines("demo", profile="cpu", artifacts_dir=artifacts_dir, progress=False)
    print("\n== 2. Serve: tritonserver on the CPU", flush=True)
    started = time.perf_counter()
    server = make_server(
        "demo",
        profile="cpu",
        artifacts_dir=artifacts_dir,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
    )
    with server:
        server.wait_ready(READY_TIMEOUT_S)
        print(f"ready after {time.perf_counter() - started:.1f} s on gRPC {server.grpc_url}")
        print("\n== 3. Ask, with pictures and a clip from demo/samples")
        with Client(server.grpc_url) as client:
            right = [_ask(client, known[name]) for name in QUESTIONS]
    print("\nserver stopped")
    passed = all(right)
    verdict = f"{sum(right)} of {len(right)} answers are right."
    print(f"{'PASS' if passed else 'FAIL'}: {verdict}", file=sys.stdout if passed else sys.stderr)
    return passed


def _ask(client: Client, question: SampleQuestion) -> bool:
    request = question.request
    messages = json.loads(request.messages)
    media = {"images": request.images, "videos": request.videos}
    sampling = {"max_tokens": MAX_TOKENS, **request.sampling_parameters}
    tiles = client.count_tokens(messages, **media, **sampling).num_tiles
    print(f"\n{', '.join(question.files) or 'no picture'}")
    for message in messages[:-1]:
        if message["role"] == "assistant":
            print(f"A: {message['content']}")
        else:
            print(f"Q: {message['content'][-1]['text']}")
    print(f"Q: {question.question}\nA: ", end="", flush=True)
    answer = Answer()
    for chunk in client.stream(messages, answer=answer, **media, **sampling):
        print(chunk.text, end="", flush=True)
    right = answer.text == question.answer
    verdict = "right" if right else f"WRONG, it should be: {question.answer}"
    print(f"\n[{verdict}; {tiles} tile{'s' * (tiles != 1)}, {summary(answer)}]")
    return right


@program(interrupted="interrupted; the server was stopped")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clients.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    return 0 if run_demo(args.artifacts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
