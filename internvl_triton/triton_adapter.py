"""Between Triton's Python backend and the package: read tensors, send tensors, translate errors.

Every function takes `pb_utils`, the module that only the backend's own process can import.
"""

from __future__ import annotations

import collections
import functools
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import InvalidRequest
from internvl_triton.grpc_transport import stop_inputs
from internvl_triton.stop_strings import StopRule
from internvl_triton.tensor_contract import Tensor

__all__ = [
    "CancelCheck",
    "SmallTensors",
    "StopOnCancel",
    "add_batch_dimension",
    "announce_stops",
    "answer_each",
    "array",
    "arrays",
    "blobs",
    "flag",
    "is_batching",
    "is_brief",
    "parameters",
    "response",
    "stop_generation",
    "text",
]

INTERNAL_ERROR = "internal error; the server's log has the details"


def parameters(args: dict[str, str]) -> dict[str, str]:
    """Name -> value of the parameters in the model's config, from `initialize`'s arguments."""
    config = json.loads(args["model_config"])
    return {key: item["string_value"] for key, item in config["parameters"].items()}


def is_batching(args: dict[str, str]) -> bool:
    """Whether Triton makes batches for the model, by `initialize`'s arguments."""
    return int(json.loads(args["model_config"])["max_batch_size"]) > 0


def add_batch_dimension(values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One request's outputs as a batch of one."""
    return {name: value[None] for name, value in values.items()}


def array(pb_utils: Any, request: Any, tensor: Tensor) -> NDArray[Any] | None:
    """The input's array, or None when an optional input is absent."""
    found = pb_utils.get_input_tensor_by_name(request, tensor.name)
    return None if found is None else found.as_numpy()


def arrays(request: Any) -> dict[str, NDArray[Any]]:
    """All inputs that the request has.

    To ask for one after the other makes a list of all of them each time, which for the few bytes of
    a token is most of a step's work.
    """
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def blobs(pb_utils: Any, request: Any, tensor: Tensor) -> list[bytes]:
    """The elements of a STRING input, [] when it is absent."""
    found = array(pb_utils, request, tensor)
    if found is None:
        return []
    return [item if isinstance(item, bytes) else str(item).encode() for item in found.reshape(-1)]


def text(pb_utils: Any, request: Any, tensor: Tensor) -> str | None:
    """A STRING input of one element as text, None when it is absent.

    Raises InvalidRequest when it is not UTF-8 or has another number of elements.
    """
    found = blobs(pb_utils, request, tensor)
    if not found:
        return None
    if len(found) > 1:
        raise InvalidRequest(f"{tensor.name} has {len(found)} elements; it takes one")
    try:
        return found[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{tensor.name} is not valid UTF-8: {error.reason}") from error


def flag(pb_utils: Any, request: Any, tensor: Tensor) -> bool:
    """A BOOL input, False when it is absent."""
    found = array(pb_utils, request, tensor)
    return bool(found is not None and found.size and found.reshape(-1)[0])


def is_brief(request: Any) -> bool:
    """Whether the request has the parameter `tensor_contract.BRIEF`."""
    return _is_brief(request.parameters())


@functools.lru_cache(maxsize=64)
def _is_brief(parameters: str) -> bool:
    return json.loads(parameters or "{}").get(contract.BRIEF) is True


class SmallTensors:
    """`pb_utils.Tensor`, but what has one number or one short string is made once and sent again.

    Making tensors is most of what postprocessing does for a token, and the same ones come again and
    again. The backend allows it: a tensor's copy in shared memory is made when it is first sent,
    counts its users, and is never written again (`PbTensor::SaveToSharedMemory`). That first time
    must not come in two threads at once, so a step may use this if one thread sends its responses.
    """

    MAX_TENSORS = 4096
    MAX_BYTES = 64

    def __init__(self, pb_utils: Any) -> None:
        self._make = pb_utils.Tensor
        self._made = functools.lru_cache(self.MAX_TENSORS)(functools.partial(_small, pb_utils))

    def __call__(self, name: str, value: NDArray[Any]) -> Any:
        if value.size != 1 or value.dtype not in (np.int32, np.object_):
            return self._make(name, value)
        item = value.item()
        if isinstance(item, bytes) and len(item) > self.MAX_BYTES:
            return self._make(name, value)
        return self._made(name, value.dtype, value.ndim, item)


def _small(pb_utils: Any, name: str, dtype: Any, ndim: int, item: int | bytes) -> Any:
    value = np.empty((1,) * ndim, dtype)
    value.fill(item)
    return pb_utils.Tensor(name, value)


def response(
    pb_utils: Any,
    values: dict[str, Any],
    tensor: Callable[[str, NDArray[Any]], Any] | None = None,
) -> Any:
    """A response of numpy arrays, and of GPU tensors, which stay on their GPU (DLPack).

    tensor: makes those of numpy arrays; None is `pb_utils.Tensor`.
    """
    tensor = tensor or pb_utils.Tensor
    return pb_utils.InferenceResponse(
        output_tensors=[
            tensor(name, value)
            if isinstance(value, np.ndarray)
            else pb_utils.Tensor.from_dlpack(name, value)
            for name, value in values.items()
        ]
    )


def answer_each(
    pb_utils: Any,
    requests: Iterable[Any],
    answer: Callable[[Any], dict[str, Any]],
    tensor: Callable[[str, NDArray[Any]], Any] | None = None,
) -> list[Any]:
    """One response per request. What the caller did wrong is INVALID_ARG with its message;
    anything else is INTERNAL without details, and the traceback goes to the log.

    tensor: see `response`.
    """
    responses = []
    for request in requests:
        try:
            responses.append(response(pb_utils, answer(request), tensor))
        except InvalidRequest as error:
            message = contract.INVALID_REQUEST + str(error)
            responses.append(
                pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                )
            )
        except Exception as error:  # noqa: BLE001 - the boundary to Triton: no request is lost
            log_exception(pb_utils, error)
            responses.append(
                pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(INTERNAL_ERROR, pb_utils.TritonError.INTERNAL)
                )
            )
    return responses


def log_exception(pb_utils: Any, error: BaseException) -> None:
    import traceback

    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


class CancelCheck:
    """Whether the caller has cancelled, asked of the server at most every PERIOD_S.

    Each question is a message to the server's process and back; between steps there is no need
    for one per token, and a server that dies meanwhile would leave the asking thread waiting.
    """

    PERIOD_S = 0.2

    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        self._is_cancelled = is_cancelled
        self._next = time.monotonic() + self.PERIOD_S

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.PERIOD_S
        return self._is_cancelled()


class StopOnCancel:
    """Frees the batch slot of a client that went away without sending a stop itself.

    A running ensemble step never sees the client's cancel; a step scheduled after it does. So
    postprocessing sends `tensorrt_llm` the stop from a thread, and again if answers still come
    RESEND_S later: an id can belong to a new request by then. It must keep answering normally: an
    error here would leak the ensemble's request. As in `CancelCheck`, the server is not asked at
    every token: at an answer's first one, then every PERIOD_S. A question takes longer than a chunk
    and all streams wait for it, so many streams ask less often: PER_SECOND times together.
    """

    PERIOD_S = 0.1
    PER_SECOND = 100
    RESEND_S = 1.0
    FORGET_S = 1.0  # after its next question was due, an answer has ended

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        # Request id -> when to ask next; who was asked longest ago comes first.
        self._next: collections.OrderedDict[str, float] = collections.OrderedDict()

    def __call__(self, request: Any) -> None:
        request_id = request.request_id()
        now = time.monotonic()
        if not request_id or now < self._next.get(request_id, now):
            return
        cancelled = request.is_cancelled()
        while self._next and next(iter(self._next.values())) < now - self.FORGET_S:
            self._next.popitem(last=False)
        period = max(self.PERIOD_S, len(self._next) / self.PER_SECOND)
        self._next[request_id] = now + (self.RESEND_S if cancelled else period)
        self._next.move_to_end(request_id)
        if cancelled:
            stop_generation(self._pb_utils, request_id)


def stop_generation(pb_utils: Any, request_id: str) -> None:
    """Tell `tensorrt_llm` to end this request; returns at once, a thread sends it."""

    def send() -> None:
        values = stop_inputs()
        try:
            request = pb_utils.InferenceRequest(
                model_name=contract.TENSORRT_LLM.name,
                request_id=request_id,
                requested_output_names=[
                    contract.OUTPUT_IDS.name,
                    contract.SEQUENCE_LENGTH.name,
                ],
                inputs=[pb_utils.Tensor(name, value) for name, value in values.items()],
            )
            for _ in request.exec(decoupled=True):
                pass
        except Exception as error:  # noqa: BLE001 - a thread of its own: nobody else would see it
            log_exception(pb_utils, error)

    threading.Thread(target=send, daemon=True).start()


def announce_stops(pb_utils: Any, request_id: str, rule: StopRule | None) -> None:
    """Tell `postprocessing` the stop strings of a request, before its first chunk gets there.

    By BLS: an ensemble's step behind the language model gets no tensor of an earlier step. None:
    there is nothing to tell.

    Raises InvalidRequest when the request cannot be told from others.
    """
    if rule is None:
        return
    if not request_id:
        raise InvalidRequest(
            "stop needs a request id, by which the pieces of the answer are recognised; give the "
            'request an id of its own, over HTTP as "id": "..." beside the inputs'
        )
    empty = np.zeros((1, 1), np.int32)
    values = {
        contract.STOP_RULE.name: np.array([[rule.to_json().encode()]], np.object_),
        contract.OUTPUT_IDS.name: empty[None],
        contract.SEQUENCE_LENGTH.name: empty,
        contract.NUM_INPUT_TOKENS.name: empty,
    }
    answer = pb_utils.InferenceRequest(
        model_name=contract.POSTPROCESSING.name,
        request_id=request_id,
        requested_output_names=[contract.STOPPED.name],
        inputs=[pb_utils.Tensor(name, value) for name, value in values.items()],
    ).exec()
    if answer.has_error():
        message = str(answer.error().message())
        if message.startswith(contract.INVALID_REQUEST):
            raise InvalidRequest(message.removeprefix(contract.INVALID_REQUEST))
        raise RuntimeError(message)
