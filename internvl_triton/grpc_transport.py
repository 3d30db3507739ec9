"""The client's connection to Triton: ModelStreamInfer over grpc.aio, one stream per request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import (
    InvalidRequest,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)

__all__ = ["GrpcTransport", "stop_inputs"]

Tensors = dict[str, NDArray[Any]]


class GrpcTransport:
    """Triton's ModelStreamInfer over grpc.aio. One stream per request."""

    def __init__(self, url: str) -> None:
        from tritonclient.grpc import aio

        self.url = url
        self._client = aio.InferenceServerClient(url)

    async def stream(
        self, tensors: Tensors, request_id: str, timeout_s: float
    ) -> AsyncIterator[Tensors]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": contract.ENSEMBLE.name,
                "inputs": _infer_inputs(tensors),
                "request_id": request_id,
                "enable_empty_final_response": True,
            }

        # With this header an error arrives with its status code and ends the stream.
        call = self._client.stream_infer(requests(), headers={"triton_grpc_error": "true"})
        try:
            async for result, error in call:
                if error is not None:
                    raise _translated(error, self.url)
                arrays = {
                    tensor.name: result.as_numpy(tensor.name)
                    for tensor in contract.ENSEMBLE.outputs
                }
                # The last response of a stream can be empty; it can also hold the last token.
                if all(array is not None for array in arrays.values()):
                    yield arrays
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return
            raise ServerUnavailable(f"{self.url} ended the stream before the answer was complete")
        except _foreign_errors() as error:
            raise _translated(error, self.url) from error
        finally:
            call.cancel()

    async def stop(self, request_id: str) -> None:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": contract.TENSORRT_LLM.name,
                "inputs": _infer_inputs(stop_inputs()),
                "request_id": request_id,
                "enable_empty_final_response": True,
            }

        call = self._client.stream_infer(requests())
        try:
            async for _ in call:
                return
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

    async def close(self) -> None:
        await self._client.close()


def _infer_inputs(tensors: Tensors) -> list[Any]:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, value in tensors.items():
        item = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        item.set_data_from_numpy(value)
        inputs.append(item)
    return inputs


def _foreign_errors() -> tuple[type[Exception], ...]:
    from grpc.aio import AioRpcError
    from tritonclient.utils import InferenceServerException

    return InferenceServerException, AioRpcError


def _translated(error: Any, url: str) -> Exception:
    """Triton's or gRPC's exception as one of ours; every status code lands somewhere."""
    if hasattr(error, "details"):  # grpc.aio.AioRpcError
        status, message = error.code().name, str(error.details() or "").strip()
    else:
        status = str(error.status() or "").removeprefix("StatusCode.")
        message = str(error.message() or "").strip()
    message = message.removeprefix(f"in ensemble '{contract.ENSEMBLE.name}', ")
    if status == "INVALID_ARGUMENT":
        return InvalidRequest(message)
    if status == "UNAVAILABLE":
        return ServerUnavailable(
            f"the server at {url} cannot be reached or is overloaded: {message}"
        )
    if status == "DEADLINE_EXCEEDED":
        return RequestTimedOut(f"{url}: {message}")
    if status == "NOT_FOUND":
        return ServerUnavailable(f"{url} does not serve {contract.ENSEMBLE.name!r}: {message}")
    return RequestFailed(
        message or f"the server at {url} failed the request ({status or 'unknown'})"
    )


def stop_inputs() -> Tensors:
    """Inputs of the request that ends a generation: NVIDIA's `prepare_stop_signals`."""
    return {
        contract.INPUT_IDS.name: np.zeros((1, 1), np.int32),
        contract.INPUT_LENGTHS.name: np.zeros((1, 1), np.int32),
        contract.REQUEST_OUTPUT_LEN.name: np.zeros((1, 1), np.int32),
        contract.STOP.name: np.ones((1, 1), np.bool_),
    }
