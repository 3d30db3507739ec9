"""The postprocessing step: generated ids to the answer's bytes, one response at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import InvalidRequest
from internvl_triton.stop_strings import StopRule, StopScanner
from internvl_triton.token_bytes import TokenBytes
from internvl_triton.top_log_probs import top_log_probs

__all__ = ["Postprocessor"]

_ALL = frozenset(tensor.name for tensor in contract.POSTPROCESSING.outputs)
T = TypeVar("T")
_MAX_KNOWN = 4096  # requests: far more than can wait and run; what is forgotten first has ended


class Postprocessor:
    """Chunk by chunk, a chunk's text depends on its own ids only.

    Except for requests with stop strings: these announce themselves by request id before their
    first chunk, and are kept here until their answer has ended. There is one instance of this
    step, so it sees every chunk of a request, in order.

    vocab_size: of the model; its logits are padded behind it.
    stop_generation: called with a request's id once a stop string was found; must not block.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        stop_generation: Callable[[str], None],
        *,
        vocab_size: int,
    ) -> None:
        self.token_bytes = token_bytes
        self.vocab_size = vocab_size
        self._stop_generation = stop_generation
        self._scanners: OrderedDict[str, StopScanner] = OrderedDict()
        self._begun: OrderedDict[str, None] = OrderedDict()

    def __call__(
        self,
        response: dict[str, NDArray[Any]],
        request_id: str = "",
        *,
        wanted: Collection[str] = _ALL,
        brief: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """One response of `tensorrt_llm` to one of the ensemble, or an announcement (`stop_rule`).

        wanted: names of outputs; no other one is made. brief: see `tensor_contract.BRIEF`.

        Takes output_ids int32 [1, 1, length] (only the first sequence_length of them count),
        gives text_output [1] (bytes that may end inside a UTF-8 character), output_ids [n] and
        the rest of `tensor_contract.POSTPROCESSING.outputs`. Behind a stop string there is neither
        text nor an id.

        Raises InvalidRequest for the announcement of an id that another request is using.
        """
        rule = response.get(contract.STOP_RULE.name)
        if rule is not None and rule.size:
            self._announce(request_id, StopRule.from_json(bytes(rule.reshape(-1)[0]).decode()))
        ids = response[contract.OUTPUT_IDS.name].reshape(-1)
        lengths = response[contract.SEQUENCE_LENGTH.name].reshape(-1)
        ids = ids[: int(lengths[0])] if len(lengths) else ids[:0]
        num_new = len(ids)
        error = response.get(contract.ERROR.name)
        error_text = b"" if error is None or not error.size else bytes(error.reshape(-1)[0])
        stopped = False
        scanner = self._scanners.get(request_id) if rule is None else None
        if scanner is None:
            text = self.token_bytes.join(ids.tolist())
        else:
            text, count, stopped = self._scan(request_id, scanner, ids.tolist(), bool(error_text))
            ids = ids[:count]
        outputs = {
            contract.TEXT_OUTPUT.name: np.array([text], np.object_),
            contract.ANSWER_IDS.name: ids.astype(np.int32, copy=False),
        }
        if not brief or self._is_first(request_id):
            num_input_tokens = _scalar(response, contract.NUM_INPUT_TOKENS.name)
            outputs[contract.NUM_INPUT_TOKENS.name] = num_input_tokens
        if not brief:
            outputs[contract.NUM_OUTPUT_TOKENS.name] = np.array([len(ids)], np.int32)
        if stopped or not brief:
            outputs[contract.STOPPED.name] = np.array([stopped])
        if error_text or not brief:
            outputs[contract.ERROR.name] = np.array([error_text], np.object_)
        log_probs = response.get(contract.OUTPUT_LOG_PROBS.name)
        if log_probs is not None:
            # TensorRT-LLM 0.21 sends the log-probs of the whole answer so far with every chunk.
            new = log_probs.reshape(-1)[-num_new:] if num_new else log_probs.reshape(-1)[:0]
            outputs[contract.LOG_PROBS.name] = new[: len(ids)].astype(np.float32)
        elif not brief:
            outputs[contract.LOG_PROBS.name] = np.zeros(0, np.float32)
        if contract.GENERATION_LOGITS.name in response or not brief:
            outputs.update(self._top_log_probs(response, len(ids)))
        if wanted is _ALL:
            return outputs
        return {name: value for name, value in outputs.items() if name in wanted}

    def _is_first(self, request_id: str) -> bool:
        """Whether this is the first brief response of a request; true of all without an id."""
        if request_id in self._begun:
            return False
        if request_id:
            _remember(self._begun, request_id, None)
        return True

    def _top_log_probs(
        self, response: dict[str, NDArray[Any]], num_tokens: int
    ) -> dict[str, NDArray[Any]]:
        logits = response.get(contract.GENERATION_LOGITS.name)
        if logits is None:
            logits = np.zeros((0, self.vocab_size), np.float32)
        ids, values = top_log_probs(
            logits.reshape(-1, logits.shape[-1])[:num_tokens], self.vocab_size
        )
        return {contract.TOP_TOKEN_IDS.name: ids, contract.TOP_LOG_PROBS.name: values}

    def _announce(self, request_id: str, rule: StopRule) -> None:
        known = self._scanners.get(request_id)
        if known is not None and known.num_tokens and not known.ended:
            raise InvalidRequest(
                f"request id {request_id!r} is in use by a request that has not finished; give "
                "every request an id of its own"
            )
        self._begun.pop(request_id, None)
        _remember(self._scanners, request_id, StopScanner(rule))

    def _scan(
        self, request_id: str, scanner: StopScanner, ids: list[int], failed: bool
    ) -> tuple[bytes, int, bool]:
        """Text to show, number of ids that belong to the answer, whether a stop string was found.

        A request whose generation was told to stop is kept until its last chunk, without ids.
        """
        was_stopped = scanner.stopped
        text, count = scanner.feed(self.token_bytes[token] for token in ids)
        if scanner.stopped and not was_stopped and scanner.rule.stream:
            self._stop_generation(request_id)
        if failed and not scanner.num_tokens:
            return text, count, False  # may be an id used twice: the other request goes on
        if not ids or not scanner.rule.stream or (scanner.ended and not scanner.stopped):
            del self._scanners[request_id]
        return text, count, scanner.stopped


def _remember(known: OrderedDict[str, T], request_id: str, value: T) -> None:
    """As the latest; the one before all others is forgotten when they become too many."""
    known[request_id] = value
    known.move_to_end(request_id)
    if len(known) > _MAX_KNOWN:
        known.popitem(last=False)


def _scalar(response: dict[str, NDArray[Any]], name: str) -> NDArray[np.int32]:
    return response[name].reshape(-1)[:1].astype(np.int32, copy=False)
