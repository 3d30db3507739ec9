"""The demo: build, serve, ask one question about a picture, stream the answer, stop the server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from PIL import Image

from clients.chat import read_image, summary
from internvl_triton.client import Answer, Client, ServerLimits
from internvl_triton.errors import InternVLTritonError
from internvl_triton.tiling import count_tiles
from internvl_triton.triton_server import find_free_port

__all__ = ["SAMPLES"]

SAMPLES = Path(__file__).resolve().parent / "samples"
READY_TIMEOUT_S = 120.0


def run_demo(artifacts_dir: Path) -> bool:
    """Print the whole demo; return whether the answer was the expected one."""
    from build import build_engines, make_server

    expected = json.loads((SAMPLES / "shapes.json").read_text(encoding="utf-8"))
    picture = SAMPLES / expected["image"]
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
        with Client(server.grpc_url) as client:
            answer = _ask(client, picture, expected)
    print("\nserver stopped")
    return _judge(answer, expected)


def _ask(client: Client, picture: Path, expected: dict[str, object]) -> Answer:
    limits = client.limits()
    width, height = Image.open(picture).size
    print(f"== 3. Ask about clients/samples/{picture.name} ({width}x{height} pixels)")
    print(f"Q: {expected['prompt']}")
    print("A: ", end="", flush=True)
    answer = Answer()
    for chunk in client.stream(
        str(expected["prompt"]),
        images=[read_image(str(picture))],
        answer=answer,
        max_tokens=expected["max_tokens"],
    ):
        print(chunk.text, end="", flush=True)
    print(f"\n{_tiles(limits, width, height)} tiles, {summary(answer)}")
    return answer


def _tiles(limits: ServerLimits, width: int, height: int) -> int:
    return count_tiles(
        width,
        height,
        max_tiles=limits.max_tiles,
        tile_size=limits.tile_size,
        use_thumbnail=limits.use_thumbnail,
    )


def _judge(answer: Answer, expected: dict[str, object]) -> bool:
    print(
        "\nThe demo checkpoint is small and random: its words mean nothing, but every step ran."
        f"\nReference for this question: {expected['source']}."
    )
    if answer.token_ids == expected["token_ids"]:
        print(f"PASS: all {len(answer.token_ids)} tokens are identical to the reference's.")
        return True
    print("FAIL: the tokens differ from the reference's.", file=sys.stderr)
    print(f"  got      {answer.token_ids}\n  expected {expected['token_ids']}", file=sys.stderr)
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients.demo", description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        return 0 if run_demo(args.artifacts) else 1
    except InternVLTritonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the server was stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
