"""What quantised weights change: answers and logits of int8 and int4 beside those of bf16.

    python -m benchmarks.precision_agreement --model demo
    python -m benchmarks.precision_agreement --model DIR --questions questions.jsonl

Every precision is converted as for serving and executed by the CPU engine, greedily, on the same
prompts and visual features; activations are float32 in all of them, so that only the weights
differ. Logits are compared along the answer of the first precision, which the others read too.

Columns: MB, the layers' matrices in the engine's memory (float32 if not quantised); same token, at
the positions of the first precision's answers; same answer, token for token; logit rms and max, the
difference to the first precision; right, answers equal to the known one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.questions import Question, read_questions
from benchmarks.vqa import scene_questions
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.errors import InvalidRequest
from internvl_triton.feature_cache import FeatureCache, VisionEncoder
from internvl_triton.preprocessing import Preprocessor
from internvl_triton.program import program
from internvl_triton.tokenizer import Tokenizer, load_tokenizer
from internvl_triton.vision_engine import OnnxVisionEngine

__all__ = ["Agreement", "Prompt", "compare", "measure"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """A question as the language model gets it."""

    input_ids: NDArray[np.int32]  # (n,), virtual ids at visual positions
    table: Array  # (num_visual_tokens, hidden)
    expected: str | None = None


@dataclass(frozen=True)
class Agreement:
    """One precision beside the first one. Counts are over all questions."""

    precision: str
    weight_bytes: int  # the layers' matrices in the engine's memory: float32 if not quantised
    tokens: int  # of the first precision's answers, ends of answers included
    same_tokens: int  # positions at which this precision would have chosen the same token
    answers: int
    same_answers: int
    expected: int  # questions whose right answer is known
    right: int
    rms_error: float  # of all logits at those positions, the mean of each position taken away
    max_error: float


def compare(
    models: dict[str, Transformer],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    progress: bool = False,
) -> list[Agreement]:
    """Each of `models` beside the first of them, in their order."""
    from tqdm import tqdm

    answers: dict[str, list[list[int]]] = {}
    logits: dict[str, list[Array]] = {}
    reference, *_ = models
    for name, model in models.items():
        runs = [
            _answer(model, prompt, tokenizer.end_id, max_tokens)
            for prompt in tqdm(prompts, unit=" answers", desc=name, disable=not progress)
        ]
        answers[name] = [answer for answer, _ in runs]
        if name == reference:
            logits[name] = [rows for _, rows in runs]
        else:
            logits[name] = [
                _read_answer(model, prompt, answer)
                for prompt, answer in zip(prompts, answers[reference], strict=True)
            ]
    first = np.concatenate(logits[reference])
    table = []
    for name, model in models.items():
        own = np.concatenate(logits[name])
        error = _centred(own) - _centred(first)
        texts = [
            tokenizer.token_bytes.join(answer).decode(errors="replace").strip()
            for answer in answers[name]
        ]
        known = [
            (text, prompt.expected.strip())
            for text, prompt in zip(texts, prompts, strict=True)
            if prompt.expected is not None
        ]
        table.append(
            Agreement(
                precision=name,
                weight_bytes=_weight_bytes(model),
                tokens=len(first),
                same_tokens=int((own.argmax(axis=1) == first.argmax(axis=1)).sum()),
                answers=len(prompts),
                same_answers=sum(map(list.__eq__, answers[name], answers[reference])),
                expected=len(known),
                right=sum(text == expected for text, expected in known),
                rms_error=float(np.sqrt(np.mean(np.square(error)))),
                max_error=float(np.abs(error).max()),
            )
        )
    return table


def measure(
    model: str,
    questions: Sequence[Question],
    *,
    precisions: Sequence[str],
    tp_size: int,
    max_tokens: int,
    artifacts_dir: Path,
) -> list[Agreement]:
    """Convert `model` to each precision and compare. Raises InternVLTritonError."""
    from build import build_engines

    models: dict[str, Transformer] = {}
    for precision in precisions:
        llm = LLMBuild(precision, tp_size)
        artifacts = build_engines(
            model,
            tp_size=tp_size,
            profile="cpu",
            precision=precision,
            artifacts_dir=artifacts_dir,
            only=("tokenizer", "vision", llm.step),
        )
        models[precision] = Transformer.from_checkpoint(
            artifacts.llm_checkpoint(llm), max_seq_len=artifacts.limits().max_seq_len
        )
    tokenizer = load_tokenizer(artifacts.tokenizer_dir)
    prompts = _prompts(artifacts, tokenizer, questions)
    return compare(models, prompts, tokenizer, max_tokens=max_tokens, progress=True)


def _scene_questions(count: int) -> list[Question]:
    """Questions about generated scenes, with the right answers that the demo model should give."""
    return [Question(q.request, q.answers[0]) for q in islice(scene_questions(count), count)]


def _prompts(
    artifacts: Artifacts, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[Prompt]:
    """The service's own first two steps."""
    from tqdm import tqdm

    preprocess = Preprocessor(artifacts.spec(), artifacts.limits(), tokenizer)
    encoder = VisionEncoder(OnnxVisionEngine(artifacts.vision_onnx), FeatureCache[Any](0))
    prompts = []
    for number, question in enumerate(tqdm(questions, unit=" questions", desc="vision"), start=1):
        try:
            tensors = preprocess(question.request)
        except InvalidRequest as error:
            raise InvalidRequest(f"question {number}: {error}") from error
        encoded = encoder.encode(
            tensors[contract.TILES.name],
            tensors[contract.TILES_PER_IMAGE.name],
            tensors[contract.IMAGE_DIGESTS.name],
        )
        ids = tensors[contract.INPUT_IDS.name][0]
        prompts.append(Prompt(ids, encoded.features, question.answer))
    return prompts


def _answer(
    model: Transformer, prompt: Prompt, end_id: int, max_tokens: int
) -> tuple[list[int], Array]:
    """The greedy answer, with the end if it comes, and the logits that chose each token."""
    caches = model.new_caches()
    segment = Segment(prompt.input_ids, caches, prompt.table)
    rows = [model.logits(model.forward([segment])[-1:])]
    answer = [int(rows[0].argmax())]
    while answer[-1] != end_id and len(answer) < max_tokens:
        last = Segment(np.array(answer[-1:], np.int32), caches)
        rows.append(model.logits(model.forward([last])))
        answer.append(int(rows[-1].argmax()))
    return answer, np.concatenate(rows)


def _read_answer(model: Transformer, prompt: Prompt, answer: list[int]) -> Array:
    """Logits of `model` at every position of an answer that it reads: (len(answer), vocab)."""
    ids = np.concatenate([prompt.input_ids, np.array(answer[:-1], np.int32)])
    hidden = model.forward([Segment(ids, model.new_caches(), prompt.table)])
    return model.logits(hidden[-len(answer) :])


def _centred(logits: Array) -> Array:
    """A constant added to all logits of a position changes no probability."""
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _weight_bytes(model: Transformer) -> int:
    return sum(
        getattr(layer, matrix).nbytes
        for rank in model.ranks
        for layer in rank.layers
        for matrix in ("qkv", "dense", "fc", "gate", "proj")
    )


def report(rows: Sequence[Agreement], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{Path(model).name} beside {first.precision} on the CPU engine: "
        f"{first.answers} questions, {first.tokens} tokens"
    )
    table.add_column("weights")
    columns = ["MB", "same token", "same answer", "logit rms", "logit max"]
    if first.expected:
        columns.append("right")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            row.precision,
            f"{row.weight_bytes / 1e6:.2f}",
            _percent(row.same_tokens, row.tokens),
            _percent(row.same_answers, row.answers),
            f"{row.rms_error:.4f}",
            f"{row.max_error:.3f}",
        ]
        if first.expected:
            cells.append(_percent(row.right, row.expected))
        table.add_row(*cells)
    Console().print(table)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision_agreement", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="name or directory (%(default)s)")
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", "int8", "int4"], help="the first is compared to"
    )
    parser.add_argument("--questions", type=Path, help="JSONL file; default: the demo's scenes")
    parser.add_argument("--count", type=int, default=200, help="of the demo's (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of one answer (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    if min(args.count, args.max_tokens) < 1:
        parser.error("--count and --max-tokens must be at least 1")
    questions = read_questions(args.questions) if args.questions else _scene_questions(args.count)
    rows = measure(
        args.model,
        questions,
        precisions=args.precisions,
        tp_size=args.tp_size,
        max_tokens=args.max_tokens,
        artifacts_dir=args.artifacts,
    )
    report(rows, args.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
