"""The gpu profile's repository answers the demo's samples: everything but NVIDIA's two engines.

Configs and model.py files are those that a GPU machine serves, with a vision engine on each of two
GPUs. The backend `tensorrtllm` is the CPU engine behind the tensors that TensorRT-LLM's backend
would get, features in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from build import build_engines
from demo import SampleQuestion, sample_questions
from internvl_triton.artifacts import LLMBuild
from internvl_triton.client import Client
from tests.integration.gpu_stand_ins import MAX_TILES_PER_RUN, gpu_profile_server
from tests.integration.samples import assert_right

pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

pytestmark = [pytest.mark.triton, pytest.mark.slow]

LLM = LLMBuild("bf16", 2)

TENSORRTLLM = """
import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
from internvl_triton.cpu_llm import CpuLlmEngine
from internvl_triton.llm_tensors import chunk_tensors, generation_request

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
TABLE = "prompt_embedding_table"

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        assert config["backend"] == "tensorrtllm"
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = {tensor["name"] for tensor in config["output"]}
        engine = Path(config["parameters"]["gpt_model_path"]["string_value"])
        self.engine = CpuLlmEngine(
            engine.parent / "checkpoint", max_batch_size=4, max_seq_len=8192,
            max_visual_tokens=16384, max_queue_size=64,
        )

    def execute(self, requests):
        for request in requests:
            self.start(request, request.get_response_sender())

    def start(self, request, sender):
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
        arrays = {name: tensor.as_numpy() for name, tensor in found.items()
                  if tensor is not None and name != TABLE}
        table = torch.from_dlpack(found[TABLE].to_dlpack())
        assert table.dtype == torch.bfloat16
        arrays[TABLE] = table.float().numpy()

        generation = generation_request(
            arrays, request_id=request.request_id(), is_cancelled=sender.is_cancelled
        )

        def send(chunk):
            tensors = chunk_tensors(chunk, generation)
            response = pb_utils.InferenceResponse([
                pb_utils.Tensor(name, value) for name, value in tensors.items()
                if name in self.outputs
            ])
            sender.send(response, flags=FINAL if chunk.final else 0)

        self.engine.submit(generation, send)

    def finalize(self):
        self.engine.close()
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root: Path = tmp_path_factory.mktemp("gpu_profile_answers")
    artifacts = build_engines(
        "demo",
        profile="cpu",
        tp_size=LLM.tp_size,
        artifacts_dir=root / "artifacts",
        limits={"max_tiles_per_run": MAX_TILES_PER_RUN},
        progress=False,
    )
    with (
        gpu_profile_server(artifacts, LLM, TENSORRTLLM) as server,
        Client(server.grpc_url, timeout_s=60) as connected,
    ):
        yield connected


@pytest.mark.parametrize("question", sample_questions(), ids=lambda question: question.name)
def test_the_answer_is_right(client: Client, question: SampleQuestion) -> None:
    assert_right(client, question)
