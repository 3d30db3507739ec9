"""The postprocessing step: generated ids to the answer's bytes, one response at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.token_bytes import TokenBytes

__all__ = ["Postprocessor"]


class Postprocessor:
    """Keeps no state: a chunk's text depends on its own ids only."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.token_bytes = token_bytes

    def __call__(self, response: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One response of `tensorrt_llm` to one of the ensemble.

        Takes output_ids int32 [1, 1, length] (only the first sequence_length of them count),
        gives text_output [1] (bytes that may end inside a UTF-8 character), output_ids [n] and
        the rest of `tensor_contract.POSTPROCESSING.outputs`.
        """
        ids = response[contract.OUTPUT_IDS.name].reshape(-1)
        lengths = response[contract.SEQUENCE_LENGTH.name].reshape(-1)
        ids = ids[: int(lengths[0])] if len(lengths) else ids[:0]
        # TensorRT-LLM 0.21 sends the log-probs of the whole answer so far with every chunk.
        log_probs = response.get(contract.OUTPUT_LOG_PROBS.name)
        error = response.get(contract.ERROR.name)
        error_text = b"" if error is None or not error.size else bytes(error.reshape(-1)[0])
        text = self.token_bytes.join(ids.tolist())
        return {
            contract.TEXT_OUTPUT.name: np.array([text], np.object_),
            contract.ANSWER_IDS.name: ids.astype(np.int32),
            contract.NUM_INPUT_TOKENS.name: _scalar(response, contract.NUM_INPUT_TOKENS.name),
            contract.NUM_OUTPUT_TOKENS.name: _scalar(response, contract.NUM_OUTPUT_TOKENS.name),
            contract.LOG_PROBS.name: (
                np.zeros(0, np.float32)
                if log_probs is None
                else log_probs.reshape(-1)[-len(ids) :][: len(ids)].astype(np.float32)
            ),
            contract.ERROR.name: np.array([error_text], np.object_),
        }


def _scalar(response: dict[str, NDArray[Any]], name: str) -> NDArray[np.int32]:
    return response[name].reshape(-1)[:1].astype(np.int32)
