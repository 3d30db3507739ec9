"""The `tensorrt_llm` step's tensors to and from the CPU engine's request and chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.cpu_llm import GenerationChunk, GenerationRequest
from internvl_triton.guides import Guide
from internvl_triton.tensor_contract import Tensor

__all__ = ["chunk_tensors", "generation_request"]

Tensors = dict[str, NDArray[Any]]


def generation_request(
    tensors: Tensors, *, request_id: str, is_cancelled: Callable[[], bool], timeout_s: float = 0.0
) -> GenerationRequest:
    """One request of a batch of one, with TensorRT-LLM's defaults for absent inputs.

    Raises ValueError when more than one sequence is sent at once.
    """
    ids = tensors[contract.INPUT_IDS.name]
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"input_ids has shape {ids.shape}; one sequence a request: [1, n]")

    def scalar(tensor: Tensor, default: Any) -> Any:
        value = tensors.get(tensor.name)
        return default if value is None or not value.size else value.reshape(-1)[0].item()

    def flat(tensor: Tensor) -> NDArray[Any] | None:
        value = tensors.get(tensor.name)
        return None if value is None else value.reshape(value.shape[1:])

    length = scalar(contract.INPUT_LENGTHS, ids.shape[1])
    return GenerationRequest(
        request_id=request_id,
        input_ids=ids[0, :length],
        prompt_embedding_table=flat(contract.PROMPT_EMBEDDING_TABLE),
        prompt_table_extra_ids=flat(contract.PROMPT_TABLE_EXTRA_IDS),
        request_output_len=scalar(contract.REQUEST_OUTPUT_LEN, 0),
        end_id=scalar(contract.END_ID, -1),
        stop_words=_words(flat(contract.STOP_WORDS_LIST)),
        temperature=scalar(contract.TEMPERATURE, 1.0),
        top_k=scalar(contract.RUNTIME_TOP_K, 0),
        top_p=scalar(contract.RUNTIME_TOP_P, 0.0),
        seed=scalar(contract.SEED, 0),
        repetition_penalty=scalar(contract.REPETITION_PENALTY, 1.0),
        presence_penalty=scalar(contract.PRESENCE_PENALTY, 0.0),
        frequency_penalty=scalar(contract.FREQUENCY_PENALTY, 0.0),
        min_tokens=scalar(contract.MIN_TOKENS, 0),
        return_log_probs=bool(scalar(contract.RETURN_LOG_PROBS, False)),
        return_num_output_tokens=bool(scalar(contract.RETURN_NUM_OUTPUT_TOKENS, False)),
        return_generation_logits=bool(scalar(contract.RETURN_GENERATION_LOGITS, False)),
        guide=_guide(tensors),
        streaming=bool(scalar(contract.STREAMING, False)),
        is_cancelled=is_cancelled,
        timeout_s=timeout_s,
    )


def chunk_tensors(chunk: GenerationChunk, request: GenerationRequest) -> Tensors:
    """One response: batch 1, beam 1. `error` only if the request failed, and what else can be left
    out only if `request` asks for it."""
    ids = np.array(chunk.new_token_ids, np.int32).reshape(1, 1, -1)
    tensors: Tensors = {
        contract.OUTPUT_IDS.name: ids,
        contract.SEQUENCE_LENGTH.name: np.array([[ids.size]], np.int32),
        contract.NUM_INPUT_TOKENS.name: np.array([[chunk.num_input_tokens]], np.int32),
    }
    if request.return_num_output_tokens:
        count = np.array([[chunk.num_output_tokens]], np.int32)
        tensors[contract.NUM_OUTPUT_TOKENS.name] = count
    if chunk.error:
        tensors[contract.ERROR.name] = np.array([[chunk.error.encode()]], np.object_)
    if request.return_log_probs:
        values = np.array(chunk.log_probs, np.float32)
        tensors[contract.OUTPUT_LOG_PROBS.name] = values.reshape(1, 1, -1)
    if chunk.generation_logits is not None:
        tensors[contract.GENERATION_LOGITS.name] = chunk.generation_logits[None, None]
    return tensors


def _guide(tensors: Tensors) -> Guide | None:
    texts = [
        bytes(tensors[tensor.name].reshape(-1)[0]).decode()
        for tensor in (contract.GUIDED_DECODING_GUIDE_TYPE, contract.GUIDED_DECODING_GUIDE)
        if tensor.name in tensors
    ]
    return Guide(*texts) if len(texts) == 2 else None


def _words(word_list: NDArray[np.int32] | None) -> tuple[tuple[int, ...], ...]:
    """TensorRT-LLM's word list (2, L), flat ids over end offsets padded with -1, as words."""
    if word_list is None or not word_list.size:
        return ()
    ids, offsets = word_list.tolist()
    ends = [end for end in offsets if end > 0]
    begins = [0, *ends][: len(ends)]
    return tuple(tuple(ids[begin:end]) for begin, end in zip(begins, ends, strict=True))
