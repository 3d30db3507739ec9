"""The CPU engines beside PyTorch: the vision graph, and the language model alone and with others.

    python -m benchmarks.engine_time --model demo

Both sides compute in float32 from the same checkpoint: ONNX Runtime and our numpy engine, PyTorch
and transformers' InternVL port (SDPA attention). Language model: prompts of `--prompt` random
tokens, answers of `--tokens`, greedy, none ends earlier. With 8 at a time, our engine takes 8
requests that join and leave its batch; `generate` takes them one after the other, as they would
come, and once as one batch of equal lengths, which is the best case it has. Cells: median ms;
other / ours, its smallest and largest in brackets.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.markdown import markdown_table
from benchmarks.option_types import at_least
from benchmarks.side_by_side import ratio_row, time_in_turn
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.cpu_llm import CpuLlmEngine, GenerationRequest
from internvl_triton.errors import InvalidRequest
from internvl_triton.program import program
from internvl_triton.vision_engine import OnnxVisionEngine

__all__ = ["llm_rows", "vision_rows"]

TILES = (1, 5, 13)
BATCHES = (1, 8)


def vision_rows(
    artifacts: Artifacts, port: Any, *, tile_counts: Sequence[int] = TILES, rounds: int
) -> list[list[str]]:
    """Header, then a row per number of tiles."""
    engine = OnnxVisionEngine(artifacts.vision_onnx)
    random = np.random.default_rng(0)
    size = engine.tile_size
    rows = [["tiles", "ONNX Runtime ms", "PyTorch ms", "/ ours", "largest difference"]]
    for count in tile_counts:
        tiles = random.integers(0, 256, (count, size, size, 3), np.uint8)
        difference = float(np.abs(engine.encode(tiles) - port.visual_features(tiles)).max())
        seconds = time_in_turn(
            {
                "ours": lambda tiles=tiles: engine.encode(tiles),  # type: ignore[misc]
                "PyTorch": lambda tiles=tiles: port.visual_features(tiles),  # type: ignore[misc]
            },
            rounds=rounds,
        )
        rows.append([str(count), *ratio_row(seconds), f"{difference:.1e}"])
    return rows


def llm_rows(
    artifacts: Artifacts, port: Any, *, prompt_tokens: int, tokens: int, rounds: int
) -> list[list[str]]:
    """Header, then a row per number of requests at a time."""
    spec = artifacts.spec().llm
    random = np.random.default_rng(0)
    checkpoint = artifacts.llm_checkpoint(_precision_of(artifacts))
    engine = CpuLlmEngine(
        checkpoint,
        max_batch_size=max(BATCHES),
        max_seq_len=prompt_tokens + tokens,
        max_visual_tokens=0,
        max_queue_size=max(BATCHES),
    )
    head = [
        "at a time",
        "ours ms",
        "transformers, in turn ms",
        "/ ours",
        "in one batch ms",
        "/ ours",
    ]
    rows = [[*head, "ours tokens/s", "same answers"]]
    try:
        for batch in BATCHES:
            prompts = random.integers(3, spec.vocab_size, (batch, prompt_tokens)).astype(np.int32)
            ours, theirs = _ours(engine, prompts, tokens), _theirs(port, prompts, tokens)
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            seconds = time_in_turn(
                {
                    "ours": lambda p=prompts: _ours(engine, p, tokens),  # type: ignore[misc]
                    "in turn": lambda p=prompts: [  # type: ignore[misc]
                        _theirs(port, one[None], tokens) for one in p
                    ],
                    "in one batch": lambda p=prompts: _theirs(port, p, tokens),  # type: ignore[misc]
                },
                rounds=rounds,
            )
            rate = batch * tokens / float(np.median(seconds["ours"]))
            rows.append([str(batch), *ratio_row(seconds), f"{rate:.1f}", f"{same} of {batch}"])
    finally:
        engine.close()
    return rows


def _precision_of(artifacts: Artifacts) -> LLMBuild:
    """The conversion that keeps the checkpoint's own weights, TP 1."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return LLMBuild(names[artifacts.spec().dtype], 1)


def _ours(engine: CpuLlmEngine, prompts: NDArray[np.int32], tokens: int) -> list[list[int]]:
    """Answers of all prompts, asked at once."""
    answers: list[list[int]] = [[] for _ in prompts]
    finished = threading.Semaphore(0)
    failures: list[str] = []

    def start(place: int) -> None:
        def on_chunk(chunk: Any) -> None:
            answers[place] += chunk.new_token_ids
            if chunk.error:
                failures.append(chunk.error)
            if chunk.final:
                finished.release()

        request = GenerationRequest(
            request_id="", input_ids=prompts[place], request_output_len=tokens, top_k=1
        )
        engine.submit(request, on_chunk)

    for place in range(len(prompts)):
        start(place)
    for _ in prompts:
        finished.acquire()
    if failures:
        raise InvalidRequest(failures[0])
    return answers


def _theirs(port: Any, prompts: NDArray[np.int32], tokens: int) -> list[list[int]]:
    import torch

    ids = torch.from_numpy(prompts.astype(np.int64))
    with torch.inference_mode():
        output = port.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [row[prompts.shape[1] :].tolist() for row in output]


def _load(model: str, artifacts_dir: Path) -> tuple[Artifacts, Any]:
    """What our engines run, and the port. Raises InternVLTritonError."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            f"the comparison needs {error.name}, which is not installed; run `make test-env`"
        ) from error
    from build import Port, build_engines, resolve_checkpoint

    artifacts = build_engines(model, profile="cpu", artifacts_dir=artifacts_dir, progress=False)
    port = Port(resolve_checkpoint(model, artifacts_dir))
    port.model.set_attn_implementation("sdpa")
    return artifacts, port


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="name or directory (%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(%(default)s)")
    parser.add_argument(
        "--prompt",
        type=at_least(1),
        nargs="+",
        default=(64, 512),
        metavar="N",
        help="tokens, of a question alone and of one with a picture (64 512)",
    )
    parser.add_argument("--tokens", type=at_least(1), default=64, help="of an answer (%(default)s)")
    args = parser.parse_args(argv)
    artifacts, port = _load(args.model, args.artifacts)
    rows = vision_rows(artifacts, port, rounds=args.rounds)
    print(f"\nVision tower of {artifacts.name}, float32\n\n{markdown_table(rows)}")
    for prompt in args.prompt:
        rows = llm_rows(
            artifacts, port, prompt_tokens=prompt, tokens=args.tokens, rounds=args.rounds
        )
        title = f"{prompt} + {args.tokens} tokens, float32"
        print(f"\nLanguage model of {artifacts.name}, {title}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
