"""A server that computes nothing and answers at set times: the truth to check a load run against.

    python -m benchmarks.paced_server --ttft 0.2 --gap 0.05

Speaks both protocols: the ensemble `internvl` over gRPC streams and /v1/chat/completions over HTTP.
Token k of an answer (from 0) is sent TTFT + k * GAP seconds after the request has arrived; there
are max_tokens of them. With TTFT and GAP 0 it answers at once: what is measured then is the load
generator's own cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from benchmarks.openai_target import OWNER
from internvl_triton import tensor_contract as contract
from internvl_triton.fake_transport import PARAMETERS, fake_response
from internvl_triton.triton_server import find_free_port

__all__ = ["paced_server"]

MODEL = "paced"
INPUT_TOKENS = 10
WORD = "word "
START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def paced_server(*, ttft_s: float = 0.0, gap_s: float = 0.0) -> Iterator[tuple[str, str]]:
    """One in a process of its own: its targets, grpc://... and http://.../v1."""
    grpc_port, http_port = find_free_port(), find_free_port()
    options = {"ttft": ttft_s, "gap": gap_s, "grpc-port": grpc_port, "http-port": http_port}
    command = [sys.executable, "-m", "benchmarks.paced_server"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if line.strip() != "ready":
                raise RuntimeError(f"the paced server did not start: exit code {process.wait()}")
            yield f"grpc://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}/v1"
        finally:
            process.terminate()


class _Pace:
    def __init__(self, ttft_s: float, gap_s: float) -> None:
        self._ttft_s = ttft_s
        self._gap_s = gap_s

    async def words(self, count: int) -> AsyncIterator[str]:
        arrived = time.perf_counter()
        for number in range(count):
            due = arrived + self._ttft_s + number * self._gap_s
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            # No space at the end: the client library holds white space back until more text comes.
            yield WORD.strip() if number == 0 else " " + WORD.strip()


async def _serve(pace: _Pace, grpc_port: int, http_port: int) -> None:
    async with _grpc_server(pace, grpc_port), _http_server(pace, http_port):
        print("ready", flush=True)
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _grpc_server(pace: _Pace, port: int) -> AsyncIterator[None]:
    import grpc
    from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
            config = model_config_pb2.ModelConfig(name=contract.ENSEMBLE.name)
            for key, value in {**PARAMETERS, "model": MODEL}.items():
                config.parameters[key].string_value = value
            return service_pb2.ModelConfigResponse(config=config)

        async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            async for request in requests:
                count = _max_tokens(request)
                number = 0
                async for word in pace.words(count):
                    number += 1
                    yield _response(word.encode(), final=number == count)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def _max_tokens(request: Any) -> int:
    """What the ensemble's input `sampling_parameters` asks for."""
    for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name == contract.SAMPLING_PARAMETERS.name:
            return int(json.loads(data[4:])["max_tokens"])  # behind the length of the string
    return 1


def _response(text: bytes, *, final: bool) -> Any:
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    reply = service_pb2.ModelStreamInferResponse()
    reply.infer_response.model_name = contract.ENSEMBLE.name
    reply.infer_response.parameters["triton_final_response"].bool_param = final
    values = fake_response(text, [1], num_input_tokens=INPUT_TOKENS)
    for tensor in contract.ENSEMBLE.outputs:
        array = values[tensor.name]
        datatype = "BYTES" if tensor.dtype == "STRING" else tensor.dtype
        reply.infer_response.outputs.add(
            name=tensor.name, datatype=datatype, shape=list(array.shape)
        )
        data = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        reply.infer_response.raw_output_contents.append(data)
    return reply


@contextlib.asynccontextmanager
async def _http_server(pace: _Pace, port: int) -> AsyncIterator[None]:
    from aiohttp import web

    async def models(request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "owned_by": OWNER}
        return web.json_response({"object": "list", "data": [model]})

    async def chat(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        async for word in pace.words(asked["max_tokens"]):
            await send({"choices": [{"index": 0, "delta": {"content": word}}]})
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": asked["max_tokens"]}
        await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=2**30)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paced_server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ttft", type=float, default=0.0, help="s, to the first token (0)")
    parser.add_argument("--gap", type=float, default=0.0, help="s, from token to token (0)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="(%(default)s)")
    parser.add_argument("--http-port", type=int, default=9000, help="(%(default)s)")
    args = parser.parse_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(_Pace(args.ttft, args.gap), args.grpc_port, args.http_port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
