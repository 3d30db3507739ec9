"""Client of the `internvl` ensemble over Triton's gRPC stream. Needs no torch.

    with Client("127.0.0.1:8001") as client:
        answer = client.generate("What is in the picture?", images=[Path("photo.jpg").read_bytes()])
        for chunk in client.stream("And what colour is it?", images=[...], max_tokens=64):
            print(chunk.text, end="", flush=True)

Every request has its own stream, a UUID request id and a deadline. When the caller goes away
(the iterator is closed, the task cancelled, the deadline passes), the stream is closed and the
language model is told to stop, because an ensemble's running step never sees the cancel.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import (
    InvalidRequest,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)

__all__ = ["Answer", "AsyncClient", "Chunk", "Client", "ServerLimits", "Transport"]

DEFAULT_TIMEOUT_S = 300.0
T = TypeVar("T")
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ServerLimits:
    """What the server accepts, from the ensemble's config."""

    model: str
    max_seq_len: int
    default_max_tokens: int
    max_tiles: int
    max_tiles_per_request: int
    tile_size: int
    tokens_per_tile: int
    use_thumbnail: bool


@dataclass(frozen=True)
class Chunk:
    """One piece of a streamed answer. `text` never ends inside a character."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()


@dataclass
class Answer:
    """A whole answer, stripped of white space at both ends as the reference does.

    ttft_s: send to the first chunk with text; None for an answer without text. latency_s: send
    to the last chunk. finish_reason: "length" when the answer used up what it was allowed.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    ttft_s: float | None = None
    latency_s: float = 0.0


class Transport(Protocol):
    """What the client needs of a connection. `FakeTransport` in the tests is the other one."""

    def stream(self, tensors: Tensors, request_id: str, timeout_s: float) -> AsyncIterator[Tensors]:
        """Responses of the ensemble. Closing the iterator closes the stream."""

    async def stop(self, request_id: str) -> None:
        """Tell the language model to end this request."""

    async def parameters(self) -> dict[str, str]:
        """The ensemble's config parameters."""

    async def close(self) -> None: ...


class AsyncClient:
    """The client for asyncio programs."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: Transport | None = None,
    ) -> None:
        """
        url: host:port of Triton's gRPC endpoint.
        timeout_s: deadline of one request, from sending to the last chunk.
        """
        self.timeout_s = timeout_s
        self._transport: Transport = GrpcTransport(url) if transport is None else transport
        self._limits: ServerLimits | None = None

    async def limits(self) -> ServerLimits:
        """The server's limits, asked once. Raises ServerUnavailable."""
        if self._limits is None:
            found = await self._transport.parameters()
            self._limits = ServerLimits(
                model=found["model"],
                use_thumbnail=found["use_thumbnail"] == "true",
                **{
                    key: int(found[key])
                    for key in (
                        "max_seq_len",
                        "default_max_tokens",
                        "max_tiles",
                        "max_tiles_per_request",
                        "tile_size",
                        "tokens_per_tile",
                    )
                },
            )
        return self._limits

    async def generate(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """The whole answer, in one response. Arguments and errors as `stream`."""
        answer = Answer()
        async for _ in self._run(prompt, images, videos, sampling, False, timeout_s, answer):
            pass
        return answer

    async def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        answer: Answer | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Chunk]:
        """Chunks of the answer as they are generated.

        prompt: a question, or a list of chat messages ({"role", "content"}).
        images, videos: encoded files. answer: filled while streaming.
        sampling: keys of `sampling_parameters` (max_tokens, temperature, ...).

        Raises InvalidRequest (the request is wrong), RequestFailed, RequestTimedOut,
        ServerUnavailable.
        """
        answer = Answer() if answer is None else answer
        chunks = self._run(prompt, images, videos, sampling, True, timeout_s, answer)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(
        self,
        prompt: str | Sequence[dict[str, Any]],
        images: Sequence[bytes],
        videos: Sequence[bytes],
        sampling: dict[str, Any],
        stream: bool,
        timeout_s: float | None,
        answer: Answer,
    ) -> AsyncGenerator[Chunk, None]:
        tensors = request_tensors(prompt, images, videos, sampling, stream)
        deadline_s = self.timeout_s if timeout_s is None else timeout_s
        limits = await self.limits()
        request_id = str(uuid.uuid4())
        text = _AnswerText()
        sent = time.perf_counter()
        finished = False
        responses = self._transport.stream(tensors, request_id, deadline_s)
        try:
            bounded = _until(responses, sent + deadline_s, deadline_s)
            async with contextlib.aclosing(bounded):
                async for response in bounded:
                    error = b"".join(response[contract.ERROR.name].reshape(-1).tolist())
                    if error:
                        raise RequestFailed(error.decode(errors="replace"))
                    chunk = _chunk(response, text, answer)
                    if chunk.text and answer.ttft_s is None:
                        answer.ttft_s = time.perf_counter() - sent
                    if chunk.text or chunk.token_ids:
                        yield chunk
            finished = True
        except (InvalidRequest, RequestFailed):
            finished = True
            raise
        finally:
            if not finished:
                with contextlib.suppress(ServerUnavailable, RequestFailed):
                    await asyncio.shield(self._transport.stop(request_id))
        rest = text.finish()
        if rest:
            answer.text += rest
            yield Chunk(rest, ())
        answer.latency_s = time.perf_counter() - sent
        allowed = sampling.get("max_tokens") or limits.default_max_tokens
        room = min(allowed, limits.max_seq_len - answer.num_input_tokens)
        answer.finish_reason = "length" if answer.num_output_tokens >= room else "stop"


class Client:
    """The same client for programs without an event loop: it runs one in a thread."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: Transport | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def create() -> AsyncClient:  # a gRPC channel belongs to the loop it is made in
            return AsyncClient(url, timeout_s=timeout_s, transport=transport)

        self._client = self._wait(create())

    def limits(self) -> ServerLimits:
        return self._wait(self._client.limits())

    def generate(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """As `AsyncClient.generate`."""
        return self._wait(
            self._client.generate(
                prompt, images=images, videos=videos, timeout_s=timeout_s, **sampling
            )
        )

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        answer: Answer | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """As `AsyncClient.stream`. Closing the iterator ends the request on the server."""
        chunks = self._client.stream(
            prompt, images=images, videos=videos, timeout_s=timeout_s, answer=answer, **sampling
        )
        try:
            while True:
                try:
                    yield self._wait(_next(chunks))
                except StopAsyncIteration:
                    return
        finally:
            self._wait(_close(chunks))

    def close(self) -> None:
        if self._thread.is_alive():
            self._wait(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def request_tensors(
    prompt: str | Sequence[dict[str, Any]],
    images: Sequence[bytes],
    videos: Sequence[bytes],
    sampling: dict[str, Any],
    stream: bool,
) -> Tensors:
    """The ensemble's inputs. A str is `text_input`, a list of messages is `messages`."""
    tensors: Tensors = {contract.STREAM.name: np.array([stream])}
    if isinstance(prompt, str):
        tensors[contract.TEXT_INPUT.name] = np.array([prompt.encode()], np.object_)
    else:
        tensors[contract.MESSAGES.name] = np.array([json.dumps(list(prompt)).encode()], np.object_)
    for tensor, files in ((contract.IMAGES, images), (contract.VIDEOS, videos)):
        if files:
            column = np.empty(len(files), np.object_)
            column[:] = [bytes(file) for file in files]
            tensors[tensor.name] = column
    if sampling:
        encoded = json.dumps(sampling).encode()
        tensors[contract.SAMPLING_PARAMETERS.name] = np.array([encoded], np.object_)
    return tensors


class _AnswerText:
    """Bytes to text, chunk by chunk: whole characters only, no white space at either end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # trailing white space that may turn out to be inside the answer
        self._started = False

    def feed(self, data: bytes, *, final: bool = False) -> str:
        text = self._held + self._decoder.decode(data, final)
        if not self._started:
            text = text.lstrip()
        stripped = text.rstrip()
        self._started = self._started or bool(stripped)
        self._held = text[len(stripped) :]
        return stripped

    def finish(self) -> str:
        return self.feed(b"", final=True)


def _chunk(response: Tensors, text: _AnswerText, answer: Answer) -> Chunk:
    data = b"".join(response[contract.TEXT_OUTPUT.name].reshape(-1).tolist())
    chunk = Chunk(
        text=text.feed(data),
        token_ids=tuple(response[contract.ANSWER_IDS.name].reshape(-1).tolist()),
        log_probs=tuple(response[contract.LOG_PROBS.name].reshape(-1).tolist()),
    )
    answer.text += chunk.text
    answer.token_ids += chunk.token_ids
    answer.log_probs += chunk.log_probs
    answer.num_input_tokens = int(response[contract.NUM_INPUT_TOKENS.name].reshape(-1)[0])
    answer.num_output_tokens = len(answer.token_ids)
    return chunk


async def _until(
    responses: AsyncIterator[Tensors], deadline: float, timeout_s: float
) -> AsyncGenerator[Tensors, None]:
    """Each response, or RequestTimedOut once `deadline` (time.perf_counter()) has passed."""
    try:
        while True:
            try:
                left = max(0.0, deadline - time.perf_counter())
                yield await asyncio.wait_for(_next(responses), left)
            except StopAsyncIteration:
                return
            except (asyncio.TimeoutError, TimeoutError):
                raise RequestTimedOut(
                    f"no complete answer within {timeout_s:g} s; raise timeout_s, or lower "
                    "max_tokens"
                ) from None
    finally:
        await _close(responses)


async def _next(iterator: AsyncIterator[T]) -> T:
    return await iterator.__anext__()


async def _close(iterator: AsyncIterator[Any]) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


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
        from internvl_triton.triton_adapter import stop_inputs

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
