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
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.answer import Answer, AnswerText, Chunk, next_chunk
from internvl_triton.errors import (
    InvalidRequest,
    Overloaded,
    RequestFailed,
    RequestTimedOut,
    ServerError,
    ServerUnavailable,
)
from internvl_triton.grpc_transport import GrpcTransport

__all__ = [
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "RequestCost",
    "ServerLimits",
    "Transport",
    "answer_seeds",
]

DEFAULT_TIMEOUT_S = 300.0
_NOT_STOPPED = np.array([False])
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
class RequestCost:
    """What a request would take, told without generating.

    tiles_per_image: thumbnails included, one entry per picture and per frame of a clip, in the
    prompt's order. num_input_tokens: the whole prompt, visual tokens included. max_tokens: what
    its answer may have at most.
    """

    tiles_per_image: tuple[int, ...]
    num_visual_tokens: int
    num_input_tokens: int
    max_tokens: int

    @property
    def num_tiles(self) -> int:
        return sum(self.tiles_per_image)


class Transport(Protocol):
    """What the client needs of a connection. `FakeTransport` in the tests is the other one."""

    def stream(
        self, tensors: Tensors, request_id: str, timeout_s: float, outputs: Sequence[str] = ()
    ) -> AsyncGenerator[Tensors, None]:
        """Responses of the ensemble, with the named outputs only; () is all of them. What
        `tensor_contract.BRIEF` leaves out can be missing.

        Closing the iterator closes the stream. Raises RequestTimedOut if the last response has not
        come timeout_s after the first was asked for.
        """

    async def infer(
        self, model: str, tensors: Tensors, outputs: Sequence[str], timeout_s: float
    ) -> Tensors:
        """The named outputs of one model that answers once."""

    async def stop(self, request_id: str) -> None:
        """Tell the language model to end this request."""

    async def parameters(self) -> dict[str, str]:
        """The ensemble's config parameters."""

    async def is_ready(self) -> bool:
        """Whether the ensemble takes requests. Never raises ServerUnavailable."""

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
        self._token_bytes: dict[int, bytes] = {}

    async def is_ready(self) -> bool:
        """Whether the service takes requests now."""
        return await self._transport.is_ready()

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
        """The whole answer. Arguments and errors as `stream`."""
        answer = Answer()
        # In one response, but with stop strings as a stream: they end the generation only there.
        stream = bool(sampling.get("stop"))
        async for _ in self._run(prompt, images, videos, sampling, stream, timeout_s, answer):
            pass
        return answer

    async def generate_n(
        self, prompt: str | Sequence[dict[str, Any]], n: int, **request: Any
    ) -> list[Answer]:
        """n answers to one request, as n requests at once: those with seed, seed + 1, ...

        Without a seed each has a new one. Greedy answers are all the same. Arguments and errors
        as `generate`; the first error ends the others.
        """
        if n < 1:
            raise InvalidRequest(f"n is {n}; it must be at least 1")
        seeds = answer_seeds(request.pop("seed", None), n)
        tasks = [
            asyncio.ensure_future(self.generate(prompt, **request, seed=each)) for each in seeds
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def count_tokens(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> RequestCost:
        """What this request would cost, from the ensemble's first step alone.

        Arguments and errors as `generate`: what that would refuse is refused here.
        """
        outputs = (contract.TILES_PER_IMAGE, contract.INPUT_LENGTHS, contract.REQUEST_OUTPUT_LEN)
        found = await self._transport.infer(
            contract.PREPROCESSING.name,
            request_tensors(prompt, images, videos, sampling, False),
            [tensor.name for tensor in outputs],
            self.timeout_s if timeout_s is None else timeout_s,
        )
        limits = await self.limits()
        tiles, length, max_tokens = (found[tensor.name].reshape(-1).tolist() for tensor in outputs)
        return RequestCost(
            tiles_per_image=tuple(tiles),
            num_visual_tokens=sum(tiles) * limits.tokens_per_tile,
            num_input_tokens=length[0],
            max_tokens=max_tokens[0],
        )

    async def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token adds to a text, from the ensemble's last step alone.

        Each id is asked once. Raises ServerUnavailable, RequestFailed.
        """
        unknown = sorted(set(token_ids) - self._token_bytes.keys())
        found = await asyncio.gather(*map(self._ask_token_bytes, unknown))
        self._token_bytes.update(zip(unknown, found, strict=True))
        return [self._token_bytes[token] for token in token_ids]

    async def _ask_token_bytes(self, token: int) -> bytes:
        one = np.ones((1, 1), np.int32)
        values = {
            contract.OUTPUT_IDS.name: np.full((1, 1, 1), token, np.int32),
            contract.SEQUENCE_LENGTH.name: one,
            contract.NUM_INPUT_TOKENS.name: one,
        }
        text = contract.TEXT_OUTPUT.name
        found = await self._transport.infer(
            contract.POSTPROCESSING.name, values, [text], self.timeout_s
        )
        return b"".join(found[text].reshape(-1).tolist())

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        timeout_s: float | None = None,
        answer: Answer | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of the answer as they are generated.

        prompt: a question, or a list of chat messages ({"role", "content"}).
        images, videos: encoded files. answer: filled while streaming.
        sampling: keys of `sampling_parameters` (max_tokens, temperature, ...).

        Raises InvalidRequest (the request is wrong), Overloaded (try again later), RequestFailed,
        RequestTimedOut, ServerUnavailable.
        """
        answer = Answer() if answer is None else answer
        return self._run(prompt, images, videos, sampling, True, timeout_s, answer)

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
        text = AnswerText()
        sent = time.perf_counter()
        finished = stopped = False
        outputs = wanted_outputs(sampling)
        responses = self._transport.stream(tensors, request_id, deadline_s, outputs)
        try:
            async for response in responses:
                error = response.get(contract.ERROR.name)
                if error is not None and (message := b"".join(error.reshape(-1).tolist())):
                    raise _failure(message.decode(errors="replace"))
                stopped = stopped or bool(response.get(contract.STOPPED.name, _NOT_STOPPED)[0])
                asked = sampling.get("top_logprobs") or 0
                chunk = next_chunk(response, text, answer, top_logprobs=asked)
                if chunk.text and answer.ttft_s is None:
                    answer.ttft_s = time.perf_counter() - sent
                if chunk.text or chunk.token_ids:
                    yield chunk
            finished = True
        except (InvalidRequest, Overloaded, RequestFailed):
            finished = True
            raise
        finally:
            await responses.aclose()
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
        used_up = answer.num_output_tokens >= room and not stopped
        answer.finish_reason = "length" if used_up else "stop"


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

    def generate(self, prompt: str | Sequence[dict[str, Any]], **request: Any) -> Answer:
        """As `AsyncClient.generate`."""
        return self._wait(self._client.generate(prompt, **request))

    def generate_n(
        self, prompt: str | Sequence[dict[str, Any]], n: int, **request: Any
    ) -> list[Answer]:
        """As `AsyncClient.generate_n`."""
        return self._wait(self._client.generate_n(prompt, n, **request))

    def count_tokens(self, prompt: str | Sequence[dict[str, Any]], **request: Any) -> RequestCost:
        """As `AsyncClient.count_tokens`."""
        return self._wait(self._client.count_tokens(prompt, **request))

    def stream(self, prompt: str | Sequence[dict[str, Any]], **request: Any) -> Iterator[Chunk]:
        """As `AsyncClient.stream`. Closing the iterator ends the request on the server."""
        chunks = self._client.stream(prompt, **request)
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


def answer_seeds(seed: int | None, n: int) -> list[int | None]:
    """The seeds of n answers to one request: seed, seed + 1, ...; None is a new one each time."""
    return [None if seed is None else (seed + k) % 2**64 for k in range(n)]


def _failure(error: str) -> ServerError:
    """What the language model reports as data, by how the message begins."""
    kinds: dict[str, type[ServerError]] = {
        contract.OVERLOADED: Overloaded,
        contract.TIMED_OUT: RequestTimedOut,
    }
    for beginning, kind in kinds.items():
        if error.startswith(beginning):
            return kind(error.removeprefix(beginning))
    return RequestFailed(error)


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


def wanted_outputs(sampling: dict[str, Any]) -> list[str]:
    """The ensemble's outputs that such an answer needs."""
    tensors = [
        contract.TEXT_OUTPUT,
        contract.ANSWER_IDS,
        contract.NUM_INPUT_TOKENS,
        contract.STOPPED,
        contract.ERROR,
    ]
    if sampling.get("logprobs"):
        tensors.append(contract.LOG_PROBS)
    if sampling.get("top_logprobs"):
        tensors += [contract.TOP_TOKEN_IDS, contract.TOP_LOG_PROBS]
    return [tensor.name for tensor in tensors]


async def _next(iterator: AsyncIterator[T]) -> T:
    return await iterator.__anext__()


async def _close(iterator: AsyncIterator[Any]) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
