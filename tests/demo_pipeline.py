"""The demo's four steps in one process, from the classes that serve them, open in between."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from demo.request import ServiceRequest
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.cpu_llm import CpuLlmEngine, GenerationChunk
from internvl_triton.llm_tensors import generation_request
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.vision_runtime import ONNXRUNTIME, load_vision_engine

__all__ = ["DemoPipeline", "Fault", "Tiles"]

Tiles = NDArray[np.uint8]
# What a broken step would make of a request's tiles: all of them, and how many each picture has.
Fault = Callable[[Tiles, list[int]], Tiles]


class DemoPipeline:
    """Asks one built language model. Use it as a context: the engine has a thread."""

    def __init__(self, artifacts: Artifacts, llm: LLMBuild) -> None:
        limits = artifacts.limits()
        tokenizer = load_tokenizer(artifacts.tokenizer_dir)
        self._preprocess = Preprocessor(artifacts.spec(), limits, tokenizer)
        self._vision = load_vision_engine(artifacts, {"runtime": ONNXRUNTIME})
        self._token_bytes = tokenizer.token_bytes
        self._engine = CpuLlmEngine(
            artifacts.llm_checkpoint(llm),
            max_batch_size=1,
            max_seq_len=limits.max_seq_len,
            max_visual_tokens=limits.max_tiles_per_request * 256,
            max_queue_size=1,
        )

    def __enter__(self) -> DemoPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def answer(self, request: ServiceRequest, fault: Fault | None = None) -> str:
        """The greedy answer; with a fault, to what that leaves of the pictures."""
        tensors = self._preprocess(
            Request(
                messages=request.messages,
                images=list(request.images),
                videos=list(request.videos),
                sampling_parameters=json.dumps({"max_tokens": 64, **request.sampling_parameters}),
            )
        )
        tiles = tensors[contract.TILES.name]
        if fault:
            tiles = fault(tiles, tensors[contract.TILES_PER_IMAGE.name].tolist())
        chunks: queue.Queue[GenerationChunk] = queue.Queue()
        if len(tiles):
            table = self._vision.encode(tiles)
            tensors = {**tensors, contract.PROMPT_EMBEDDING_TABLE.name: table[None]}
        self._engine.submit(
            generation_request(tensors, request_id="demo", is_cancelled=lambda: False), chunks.put
        )
        ids: list[int] = []
        while True:
            chunk = chunks.get(timeout=120)
            assert not chunk.error
            ids += chunk.new_token_ids
            if chunk.final:
                return self._token_bytes.join(ids).decode().strip()
