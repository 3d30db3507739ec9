"""Mutated requests through gRPC against a live server: an answer or a typed error, every time.

    FUZZ_REQUESTS=10000 python -m pytest tests/integration/test_fuzz_server.py

Request k is always the same one, so a failure names the request to look at.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from internvl_triton import tensor_contract as contract
from internvl_triton.grpc_transport import stop_inputs
from internvl_triton.sampling import SamplingParams
from internvl_triton.triton_adapter import INTERNAL_ERROR
from tests.integration.conftest import Service
from tests.integration.pictures import clip, encoded, picture

pytestmark = pytest.mark.triton

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "300"))
AT_ONCE = 16
TIMEOUT_S = 300.0  # a hang, not a slow machine
MAX_RESPONSES = 6  # then the caller goes away

FILES = [encoded(picture(64, 48), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
CLIP = clip([picture(32, 32, seed) for seed in range(3)])
WORDS = [
    "Hi",
    "<image>",
    "<|im_end|>",
    "<IMG_CONTEXT>",
    "\0",
    "\n",
    "你",
    "x" * 3000,
    "[",
    "\\ud83d",
]
VALUES: list[Any] = [0, 1, -1, 2, 0.5, 1e308, -0.0, True, None, "", "a", [], {}, [1], ["a", "\n"],
                     2**63, 2**64, [[]], {"a": 1}, "stop", ["x"] * 5, "9" * 400]  # fmt: skip
WIRE_TYPES = ["BYTES", "BOOL", "INT32", "UINT8", "FP32", "UINT64", "FP16"]
SHAPES = [[1], [2], [0], [1, 1], [3], [], [1, 0], [2**31], [-1]]


class Request:
    """Wire inputs: name -> [datatype, shape, raw bytes]."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.id = f"fuzz {number}"
        self.inputs: dict[str, list[Any]] = {}
        self._valid()
        for _ in range(self.random.choice([0, 1, 1, 1, 2, 3])):
            self.random.choice(
                [self._break_json, self._break_bytes, self._break_tensor, self._break_set]
            )()

    def put(self, name: str, *values: bytes) -> None:
        self.inputs[name] = ["BYTES", [len(values)], _packed(values)]

    def _valid(self) -> None:
        pick = self.random
        images = [pick.choice(FILES) for _ in range(pick.choice([0, 0, 1, 2]))]
        videos = [CLIP] * (pick.random() < 0.15)
        media = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        if pick.random() < 0.5:
            self.put("text_input", b"What is it?")
        else:
            content = [*media, {"type": "text", "text": "What is it?"}]
            self.put("messages", json.dumps([{"role": "user", "content": content}]).encode())
        if images:
            self.put("images", *images)
        if videos:
            self.put("videos", *videos)
        sampling: dict[str, Any] = {"max_tokens": pick.randint(1, 8), "num_frames": 2}
        if pick.random() < 0.3:
            sampling["stop"] = [pick.choice(["e", "a", "th", " "])]
        self.put("sampling_parameters", json.dumps(sampling).encode())
        # A mutation may lose max_tokens: a stream can be left after a few responses.
        self.inputs["stream"] = ["BOOL", [1], b"\1"]

    def _break_json(self) -> None:
        pick = self.random
        name = pick.choice([name for name in self.inputs if name in ("messages", "text_input")]
                           + ["sampling_parameters"])  # fmt: skip
        if name == "sampling_parameters":
            keys = [*SamplingParams.__dataclass_fields__, "n", "", "\u2028"]
            values = {pick.choice(keys): pick.choice(VALUES) for _ in range(pick.randint(1, 3))}
            self.put(name, json.dumps(values).encode())
        elif name in self.inputs:
            text = _texts(self.inputs[name][2])[0]
            at = pick.randint(0, len(text))
            word = pick.choice(WORDS).encode()
            self.put(name, text[:at] + word + text[at + pick.choice([0, 0, 3]) :])

    def _break_bytes(self) -> None:
        """Flip, cut or double bytes: of a file, of JSON, or of the lengths between strings."""
        tensor = self.inputs[self.random.choice(list(self.inputs))]
        data = bytearray(tensor[2])
        for _ in range(self.random.randint(1, 5)):
            if data:
                data[self.random.randrange(len(data))] = self.random.randrange(256)
        if self.random.random() < 0.3:
            data = data[: self.random.randint(0, len(data))]
        if self.random.random() < 0.1:
            data = data + data
        tensor[2] = bytes(data)

    def _break_tensor(self) -> None:
        tensor = self.inputs[self.random.choice(list(self.inputs))]
        if self.random.random() < 0.5:
            tensor[0] = self.random.choice(WIRE_TYPES)
        else:
            tensor[1] = self.random.choice(SHAPES)

    def _break_set(self) -> None:
        name = self.random.choice(list(self.inputs))
        change = self.random.choice(["drop", "rename", "both", "again", "no id"])
        if change == "drop" and name != "stream":
            del self.inputs[name]
        elif change == "rename":
            self.inputs[name + "s"] = self.inputs.pop(name)
        elif change == "both":
            self.put("text_input", b"Hi")
            self.put("messages", b'[{"role": "user", "content": "Hi"}]')
        elif change == "again" and "images" in self.inputs:
            self.put("images", *_texts(self.inputs["images"][2]) * 40)
        elif change == "no id" and "stream" in self.inputs:
            self.id = ""

    def wire(self) -> dict[str, Any]:
        from tritonclient.grpc import InferInput

        inputs = []
        for name, (datatype, shape, raw) in self.inputs.items():
            tensor = InferInput(name, shape, datatype)
            tensor._raw_content = raw
            inputs.append(tensor)
        return {
            "model_name": contract.ENSEMBLE.name,
            "inputs": inputs,
            "request_id": self.id,
            "enable_empty_final_response": True,
        }


def _packed(values: tuple[bytes, ...]) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def _texts(raw: bytes) -> list[bytes]:
    """The strings of a raw tensor, as far as its lengths make sense."""
    found, at = [], 0
    while at + 4 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found or [b""]


async def send(client: Any, request: Request) -> str:
    """What became of it: "answer", "left" or the error's text. Raises when the stream breaks."""

    async def once() -> AsyncIterator[dict[str, Any]]:
        yield request.wire()

    call = client.stream_infer(once())
    outcome, responses = "", 0
    async for result, error in call:
        if error is not None:
            outcome = outcome or str(error.message())
            continue
        final = result.get_response().parameters["triton_final_response"].bool_param
        failure = result.as_numpy(contract.ERROR.name)
        if failure is not None and failure.size and failure.reshape(-1)[0]:
            outcome = outcome or bytes(failure.reshape(-1)[0]).decode()
        responses += 1
        if responses == MAX_RESPONSES and not final and not outcome and request.id:
            outcome = "left"
            await stop(client, request.id)
        if final:
            outcome = outcome or "answer"
    return outcome or "no final response"


async def stop(client: Any, request_id: str) -> None:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, value in stop_inputs().items():
        tensor = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    ending = {"model_name": "tensorrt_llm", "inputs": inputs, "request_id": request_id}

    async def once() -> AsyncIterator[dict[str, Any]]:
        yield ending

    async for _ in client.stream_infer(once()):
        pass


async def run(url: str, count: int) -> Counter[str]:
    from tritonclient.grpc import aio

    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))
    client = aio.InferenceServerClient(url)

    async def worker() -> None:
        for number in numbers:
            request = Request(number)
            try:
                outcome = await asyncio.wait_for(send(client, request), TIMEOUT_S)
            except Exception as error:
                raise AssertionError(f"request {number}, {request.inputs}") from error
            assert INTERNAL_ERROR not in outcome, (number, request.inputs)
            assert outcome != "no final response", (number, request.inputs)
            outcomes[outcome if outcome in ("answer", "left") else "error"] += 1

    try:
        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    finally:
        await client.close()
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * REQUESTS)
def test_mutated_requests(qwen2: Service) -> None:
    before = qwen2.client.generate("What is it?", images=FILES[:1], max_tokens=6)
    outcomes = asyncio.run(run(qwen2.server.grpc_url, REQUESTS))
    print(dict(outcomes))  # noqa: T201
    assert outcomes.total() == REQUESTS
    assert min(outcomes["answer"], outcomes["error"]) > REQUESTS / 10, outcomes
    after = qwen2.client.generate("What is it?", images=FILES[:1], max_tokens=6)
    np.testing.assert_array_equal(before.token_ids, after.token_ids)
