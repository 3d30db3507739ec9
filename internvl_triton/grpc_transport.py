"""The client's connection to Triton: ModelStreamInfer over grpc.aio, one stream per request."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import (
    InvalidRequest,
    Overloaded,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)
from internvl_triton.grpc_poller import prefer_light_poller

__all__ = ["GrpcTransport", "stop_inputs", "timed_out"]

LINGER_S = 5.0
READY_TIMEOUT_S = 5.0
# How Triton's batcher and TensorRT-LLM's executor (`Executor::Impl::enqueueRequests`) refuse.
QUEUE_FULL = ("Exceeds maximum queue size", "Maximum queue size of")
Tensors = dict[str, NDArray[Any]]


class GrpcTransport:
    """Triton's ModelStreamInfer over grpc.aio. One stream per request.

    A stream is read to its end also when nobody wants its responses any more: cancelling one
    while its last response is on the way makes tritonserver 2.51 keep the request for good, and
    then it does not end on SIGTERM. `stop` brings that end near; a stream that does not end in
    LINGER_S is cancelled.
    """

    def __init__(self, url: str) -> None:
        prefer_light_poller()
        from tritonclient.grpc import aio

        self.url = url
        self._client = aio.InferenceServerClient(url)
        self._abandoned: set[asyncio.Task[None]] = set()

    async def stream(
        self, tensors: Tensors, request_id: str, timeout_s: float, outputs: Sequence[str] = ()
    ) -> AsyncGenerator[Tensors, None]:
        from tritonclient.grpc import InferRequestedOutput

        responses: asyncio.Queue[Tensors | Exception | None] = asyncio.Queue()
        request = _request(contract.ENSEMBLE.name, tensors, request_id)
        if outputs:
            request["outputs"] = [InferRequestedOutput(name) for name in outputs]
            request["parameters"] = {contract.BRIEF: True}
        request["timeout"] = max(1, round(timeout_s * 1e6))  # microseconds
        # One task and one timer for a stream, and none for each of its responses.
        reader = asyncio.create_task(self._read(request, responses))
        timer = asyncio.get_running_loop().call_later(
            timeout_s, responses.put_nowait, timed_out(timeout_s)
        )
        try:
            while (response := await responses.get()) is not None:
                if isinstance(response, Exception):
                    raise response
                yield response
        finally:
            timer.cancel()
            if not reader.done():
                linger = asyncio.create_task(_end(reader))
                self._abandoned.add(linger)
                linger.add_done_callback(self._abandoned.discard)

    async def _read(
        self, request: dict[str, Any], responses: asyncio.Queue[Tensors | Exception | None]
    ) -> None:
        """Put every response of one stream into the queue, then None or the error that ended it."""
        # Without the header `triton_grpc_error`, which brings an error's status code: with it, an
        # error at the wrong moment is a use-after-free that ends tritonserver (before 26.04).
        call = self._client.stream_infer(_once(request))
        failure: Exception | None = None
        complete = False
        try:
            async for result, error in call:
                if error is not None:
                    failure = _translated(error, self.url)
                    continue
                response = result.get_response()
                # The last response of a stream can be empty; it can also hold the last token.
                if response.outputs:
                    responses.put_nowait(_arrays(response))
                complete = response.parameters["triton_final_response"].bool_param
            if failure is None and not complete:
                failure = ServerUnavailable(
                    f"{self.url} ended the stream before the answer was complete"
                )
            responses.put_nowait(failure)
        except _foreign_errors() as error:
            responses.put_nowait(_translated(error, self.url))
        finally:
            call.cancel()  # does nothing to a stream that has ended

    async def infer(
        self, model: str, tensors: Tensors, outputs: Sequence[str], timeout_s: float
    ) -> Tensors:
        from tritonclient.grpc import InferRequestedOutput

        try:
            result = await self._client.infer(
                model,
                _infer_inputs(tensors),
                outputs=[InferRequestedOutput(name) for name in outputs],
                client_timeout=timeout_s,
            )
        except _foreign_errors() as error:
            raise _translated(error, self.url) from error
        return {name: result.as_numpy(name) for name in outputs}

    async def stop(self, request_id: str) -> None:
        call = self._client.stream_infer(
            _once(_request(contract.TENSORRT_LLM.name, stop_inputs(), request_id))
        )
        try:
            async for _ in call:
                pass
        except _foreign_errors() as error:
            raise _translated(error, self.url) from error
        finally:
            call.cancel()

    async def parameters(self) -> dict[str, str]:
        try:
            found = await self._client.get_model_config(contract.ENSEMBLE.name)
        except _foreign_errors() as error:
            raise _translated(error, self.url) from error
        return {key: item.string_value for key, item in found.config.parameters.items()}

    async def is_ready(self) -> bool:
        try:
            ready = await self._client.is_model_ready(
                contract.ENSEMBLE.name, client_timeout=READY_TIMEOUT_S
            )
        except _foreign_errors():
            return False
        return bool(ready)

    async def close(self) -> None:
        await asyncio.gather(*self._abandoned)
        await self._client.close()


async def _end(reader: asyncio.Task[None]) -> None:
    """Give an abandoned stream time to end by itself, then cancel it."""
    await asyncio.wait([reader], timeout=LINGER_S)
    reader.cancel()
    await asyncio.wait([reader])


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _request(model: str, tensors: Tensors, request_id: str) -> dict[str, Any]:
    return {
        "model_name": model,
        "inputs": _infer_inputs(tensors),
        "request_id": request_id,
        "enable_empty_final_response": True,
    }


def _infer_inputs(tensors: Tensors) -> list[Any]:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, value in tensors.items():
        item = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        item.set_data_from_numpy(value)
        inputs.append(item)
    return inputs


def _arrays(response: Any) -> Tensors:
    """All outputs of a ModelInferResponse. `InferResult.as_numpy` looks for each one anew, which
    for the few bytes of a token takes longer than anything else in the client."""
    arrays: Tensors = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = _numpy_dtype(output.datatype)
        array = _byte_strings(data) if dtype == np.object_ else np.frombuffer(data, dtype)
        arrays[output.name] = array.reshape(tuple(output.shape))
    return arrays


@functools.cache
def _numpy_dtype(datatype: str) -> Any:
    from tritonclient.utils import triton_to_np_dtype

    return np.dtype(triton_to_np_dtype(datatype))


def _byte_strings(data: bytes) -> NDArray[np.object_]:
    """Triton's BYTES: each element behind its length, four bytes, little endian."""
    found, at = [], 0
    while at < len(data):
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        found.append(data[begin:at])
    strings = np.empty(len(found), np.object_)
    strings[:] = found
    return strings


def _foreign_errors() -> tuple[type[Exception], ...]:
    from grpc.aio import AioRpcError
    from tritonclient.utils import InferenceServerException

    return InferenceServerException, AioRpcError


def _translated(error: Any, url: str) -> Exception:
    """Triton's or gRPC's exception as one of ours; every status code lands somewhere.

    An error inside a stream has no status code, so preprocessing marks what the caller did wrong.
    """
    if hasattr(error, "details"):  # grpc.aio.AioRpcError
        status, message = error.code().name, str(error.details() or "").strip()
    else:
        status = str(error.status() or "").removeprefix("StatusCode.")
        message = str(error.message() or "").strip()
    message = message.removeprefix(f"in ensemble '{contract.ENSEMBLE.name}', ")
    if status == "INVALID_ARGUMENT" or message.startswith(contract.INVALID_REQUEST):
        return InvalidRequest(message.removeprefix(contract.INVALID_REQUEST))
    if status == "NOT_FOUND" or message.startswith("Request for unknown model"):
        return ServerUnavailable(
            f"{url} does not serve {contract.ENSEMBLE.name!r}; if it does at other times, it is "
            f"starting or stopping: {message}"
        )
    if any(refusal in message for refusal in QUEUE_FULL):
        return Overloaded(f"{url} has too many requests waiting; try again later")
    if status == "UNAVAILABLE":
        return ServerUnavailable(f"the server at {url} cannot be reached: {message}")
    if status == "DEADLINE_EXCEEDED":
        return RequestTimedOut(f"{url}: {message}")
    return RequestFailed(
        message or f"the server at {url} failed the request ({status or 'unknown'})"
    )


def timed_out(timeout_s: float) -> RequestTimedOut:
    return RequestTimedOut(
        f"no complete answer within {timeout_s:g} s; raise timeout_s, or lower max_tokens"
    )


def stop_inputs() -> Tensors:
    """Inputs of the request that ends a generation: NVIDIA's `prepare_stop_signals`."""
    return {
        contract.INPUT_IDS.name: np.zeros((1, 1), np.int32),
        contract.INPUT_LENGTHS.name: np.zeros((1, 1), np.int32),
        contract.REQUEST_OUTPUT_LEN.name: np.zeros((1, 1), np.int32),
        contract.STOP.name: np.ones((1, 1), np.bool_),
    }
