"""A transport without a server, for tests of programs that use the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.grpc_transport import timed_out

__all__ = ["FakeTransport", "fake_response"]

Tensors = dict[str, NDArray[Any]]

PARAMETERS = {
    "model": "fake",
    "max_seq_len": "1000",
    "default_max_tokens": "100",
    "max_tiles": "12",
    "max_tiles_per_request": "64",
    "tile_size": "448",
    "tokens_per_tile": "256",
    "use_thumbnail": "true",
}


def fake_response(
    text: bytes,
    ids: Sequence[int] = (),
    *,
    num_input_tokens: int = 10,
    log_probs: Sequence[float] = (),
    top_log_probs: Sequence[dict[int, float]] = (),
    stopped: bool = False,
    error: str = "",
) -> Tensors:
    """One response as the ensemble sends it."""
    return {
        contract.TEXT_OUTPUT.name: np.array([text], np.object_),
        contract.ANSWER_IDS.name: np.array(ids, np.int32),
        contract.NUM_INPUT_TOKENS.name: np.array([num_input_tokens], np.int32),
        contract.NUM_OUTPUT_TOKENS.name: np.array([len(ids)], np.int32),
        contract.LOG_PROBS.name: np.array(log_probs, np.float32),
        contract.TOP_TOKEN_IDS.name: np.array([list(row) for row in top_log_probs], np.int32),
        contract.TOP_LOG_PROBS.name: np.array(
            [list(row.values()) for row in top_log_probs], np.float32
        ),
        contract.STOPPED.name: np.array([stopped]),
        contract.ERROR.name: np.array([error.encode()], np.object_),
    }


class FakeTransport:
    """Plays a script: responses, exceptions to raise, and floats to wait for, in seconds.

    requests, outputs and stopped record what the client sent.
    """

    def __init__(self, script: Sequence[Tensors | Exception | float], **parameters: str) -> None:
        self.script = list(script)
        self.requests: list[tuple[str, Tensors]] = []
        self.outputs: list[tuple[str, ...]] = []
        self.stopped: list[str] = []
        self.closed_streams = 0
        self.ready = True
        self._parameters = {**PARAMETERS, **parameters}

    async def stream(
        self, tensors: Tensors, request_id: str, timeout_s: float, outputs: Sequence[str] = ()
    ) -> AsyncGenerator[Tensors, None]:
        self.requests.append((request_id, tensors))
        self.outputs.append(tuple(outputs))
        deadline = time.monotonic() + timeout_s
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    left = deadline - time.monotonic()
                    await asyncio.sleep(min(item, max(0.0, left)))
                    if item > left:
                        raise timed_out(timeout_s)
                else:
                    yield {name: item[name] for name in outputs or item}
        finally:
            self.closed_streams += 1

    async def infer(
        self, model: str, tensors: Tensors, outputs: Sequence[str], timeout_s: float
    ) -> Tensors:
        self.requests.append((model, tensors))
        item = self.script[0]
        if isinstance(item, Exception):
            raise item
        assert not isinstance(item, float)
        return {name: item[name] for name in outputs}

    async def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)

    async def parameters(self) -> dict[str, str]:
        return dict(self._parameters)

    async def is_ready(self) -> bool:
        return self.ready

    async def close(self) -> None:
        return None
