"""What the artefacts make of the verification's questions, through the classes that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.parity.questions import Question
from build.repository import gpu_deployment
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild, Profile
from internvl_triton.client import Client
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.vision_runtime import ONNXRUNTIME, load_vision_engine

__all__ = [
    "EngineOutput",
    "ask_with",
    "compared_positions",
    "load_outputs",
    "run_engines",
    "save_outputs",
]

Array = NDArray[np.float32]
ANSWER_TOKENS = 16
PROMPT_POSITIONS = 48  # at which logits are compared, besides those of the answer


@dataclass(frozen=True)
class EngineOutput:
    """One question's way through the artefacts.

    tiles: uint8 (num_tiles, S, S, 3). input_ids: int32 (n,), virtual ids at visual positions.
    features: float32 (num_visual_tokens, hidden). answer: int32 (m,), greedy, its end included.
    logits: float32 (positions, vocab_size) at `compared_positions`; (0, 0) from an engine that
    gives none.
    """

    tiles: NDArray[np.uint8]
    input_ids: NDArray[np.int32]
    features: Array
    answer: NDArray[np.int32]
    logits: Array


def compared_positions(prompt_tokens: int, answer_tokens: int) -> list[int]:
    """Of prompt + answer: some of the prompt, evenly spread, and all that chose the answer."""
    last = prompt_tokens - 1
    spread = np.linspace(0, last, PROMPT_POSITIONS, endpoint=False).astype(int)
    return [*sorted(set(spread.tolist())), *range(last, last + answer_tokens)]


def run_engines(
    artifacts: Artifacts,
    llm: LLMBuild,
    profile: Profile,
    questions: Sequence[Question],
    answers: Callable[[Sequence[Question]], list[list[int]]],
) -> list[EngineOutput]:
    """Preprocessing and vision engine in this process, the answers from `answers`.

    On the cpu profile the language model is run once more in this process, for its logits: the
    service gives none, and NVIDIA's engines only without KV reuse.

    Raises ArtifactMismatch when an engine's files are not usable.
    """
    preprocess = Preprocessor(
        artifacts.spec(), artifacts.limits(), load_tokenizer(artifacts.tokenizer_dir)
    )
    prepared = [preprocess(_request(question)) for question in questions]
    tiles = [tensors[contract.TILES.name] for tensors in prepared]
    ids = [tensors[contract.INPUT_IDS.name][0] for tensors in prepared]
    features = _visual_features(artifacts, llm, profile, tiles)
    chosen = [np.array(answer, np.int32) for answer in answers(questions)]
    if profile == "cpu":
        logits = _logits(artifacts, llm, ids, features, chosen)
    else:
        logits = [np.empty((0, 0), np.float32)] * len(questions)
    return [
        EngineOutput(*parts) for parts in zip(tiles, ids, features, chosen, logits, strict=True)
    ]


def ask_with(client: Client, end_id: int, questions: Sequence[Question]) -> list[list[int]]:
    """Greedy answers of a running service, each with its end if it came.

    Raises RequestFailed, RequestTimedOut, ServerUnavailable.
    """
    answers = []
    for question in questions:
        answer = client.generate(
            question.prompt, images=question.pictures, max_tokens=ANSWER_TOKENS, temperature=0
        )
        ended = answer.num_output_tokens < ANSWER_TOKENS
        answers.append([*answer.token_ids, *([end_id] if ended else [])])
    return answers


def save_outputs(path: Path, outputs: Sequence[EngineOutput]) -> None:
    """One .npz file, read by `load_outputs` on the other side of the container's wall."""
    arrays = {
        f"{number}.{field.name}": getattr(output, field.name)
        for number, output in enumerate(outputs)
        for field in fields(EngineOutput)
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_outputs(path: Path) -> list[EngineOutput]:
    with np.load(path) as arrays:
        count = 1 + max(int(key.split(".")[0]) for key in arrays)
        return [
            EngineOutput(*(arrays[f"{number}.{field.name}"] for field in fields(EngineOutput)))
            for number in range(count)
        ]


def _request(question: Question) -> Request:
    if isinstance(question.prompt, str):
        return Request(text_input=question.prompt, images=question.pictures)
    return Request(messages=json.dumps(question.prompt), images=question.pictures)


def _visual_features(
    artifacts: Artifacts, llm: LLMBuild, profile: Profile, tiles: Sequence[NDArray[np.uint8]]
) -> list[Array]:
    """The engine is gone when this returns: the server needs its memory."""
    parameters = {"runtime": ONNXRUNTIME}
    if profile == "gpu":
        parameters = gpu_deployment(artifacts, llm).vision_parameters()
    engine = load_vision_engine(artifacts, parameters)
    nothing = np.empty((0, engine.hidden_size), np.float32)
    features = [_array(engine.encode(part)) if len(part) else nothing for part in tiles]
    if profile == "gpu":
        import torch

        del engine
        torch.cuda.empty_cache()
    return features


def _array(features: Any) -> Array:
    """A numpy array, or a torch tensor on some GPU, as float32."""
    if isinstance(features, np.ndarray):
        return features
    array: Array = features.float().cpu().numpy()
    return array


def _logits(
    artifacts: Artifacts,
    llm: LLMBuild,
    prompts: Sequence[NDArray[np.int32]],
    features: Sequence[Array],
    answers: Sequence[NDArray[np.int32]],
) -> list[Array]:
    from internvl_triton.cpu_llm.transformer import Segment, Transformer

    transformer = Transformer.from_checkpoint(
        artifacts.llm_checkpoint(llm), max_seq_len=artifacts.limits().max_seq_len
    )
    logits = []
    for prompt, table, answer in zip(prompts, features, answers, strict=True):
        ids = np.concatenate([prompt, answer[:-1]])
        hidden = transformer.forward([Segment(ids, transformer.new_caches(), table)])
        logits.append(transformer.logits(hidden[compared_positions(len(prompt), len(answer))]))
    return logits
