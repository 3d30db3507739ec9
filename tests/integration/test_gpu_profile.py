"""The gpu profile's repository in a real tritonserver, without a GPU.

Configs and model.py files are those that a GPU machine serves. Two things stand in for NVIDIA's:
a module `tensorrt` that runs the vision graph in ONNX Runtime on torch's CPU memory, and a backend
`tensorrtllm` that answers with facts about the tensors it was given.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from build import build_engines
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.client import Client
from internvl_triton.media import packed_pixels
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.tiling import tile_image
from internvl_triton.vision_engine import OnnxVisionEngine
from tests.integration.gpu_stand_ins import MAX_TILES_PER_RUN, gpu_profile_server
from tests.integration.pictures import encoded, picture

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

pytestmark = [pytest.mark.triton, pytest.mark.slow]

LLM = LLMBuild("bf16", 2)  # so a vision engine on each of two GPUs
MODULUS = 1000  # below the small vocabulary's size: the facts are sent as token ids

# Rows, columns and signs of the table; lengths of input_ids and extra ids; the largest input id.
TENSORRTLLM = f"""
import json
import numpy as np, torch
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        assert config["backend"] == "tensorrtllm"
        assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 64
        assert config["parameters"]["tokenizer_dir"]["string_value"] == ""
        # All but what the ensemble does not read: Triton refuses a tensor that no step reads.
        self.outputs = {{output["name"] for output in config["output"]}} - {{"num_output_tokens"}}

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            facts = self.facts(request)
            assert set(request.requested_output_names()) == self.outputs
            for number, fact in enumerate(facts):
                tensors = {{
                    "output_ids": np.array([[[fact]]], np.int32),
                    "sequence_length": np.array([[1]], np.int32),
                    "num_input_tokens": np.array([[facts[3]]], np.int32),
                }}
                response = pb_utils.InferenceResponse(
                    [pb_utils.Tensor(name, value) for name, value in tensors.items()]
                )
                sender.send(response, flags=FINAL if number == len(facts) - 1 else 0)

    def facts(self, request):
        def array(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        table = pb_utils.get_input_tensor_by_name(request, "prompt_embedding_table")
        table = torch.from_dlpack(table.to_dlpack())
        assert table.dtype == torch.bfloat16 and table.shape[0] == 1, (table.dtype, table.shape)
        rows = torch.arange(table.shape[1]).view(1, -1, 1)
        signs = ((table < 0) * rows).sum().item() % {MODULUS}
        assert array("input_lengths").shape == (1,), "reshape [] leaves the batch dimension"
        ids = array("input_ids")
        extra = array("prompt_table_extra_ids")
        return [
            table.shape[1] % {MODULUS}, table.shape[2], signs,
            ids.shape[1] % {MODULUS}, extra.shape[1] % {MODULUS}, int(ids.max()) % {MODULUS},
        ]
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    root = tmp_path_factory.mktemp("gpu_profile")
    checkpoint = write_random_checkpoint(root / "tiny", tiny_config("qwen2", "300m"))
    return build_engines(
        str(checkpoint),
        profile="cpu",
        tp_size=LLM.tp_size,
        artifacts_dir=root / "artifacts",
        limits={"max_tiles_per_run": MAX_TILES_PER_RUN},
        progress=False,
    )


@pytest.fixture(scope="module")
def client(artifacts: Artifacts) -> Iterator[Client]:
    with (
        gpu_profile_server(artifacts, LLM, TENSORRTLLM) as server,
        Client(server.grpc_url, timeout_s=60) as connected,
    ):
        yield connected


def expected_table(artifacts: Artifacts, *images: Image.Image) -> torch.Tensor:
    """bfloat16 (rows, hidden), tile by tile: the CPU profile's features, rounded."""
    tiles = np.concatenate(
        [
            tile_image(packed_pixels(i), max_tiles=12, tile_size=448, use_thumbnail=True)
            for i in images
        ]
    )
    engine = OnnxVisionEngine(artifacts.vision_onnx)
    return torch.from_numpy(engine.encode(tiles)).to(torch.bfloat16)


@pytest.mark.parametrize("sizes", [[(448, 448)], [(1280, 960)], [(448, 448), (900, 448)]])
def test_the_llm_step_gets_the_features_in_bfloat16(
    client: Client, artifacts: Artifacts, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(*size) for size in sizes]
    table = expected_table(artifacts, *images)
    signs = ((table < 0) * torch.arange(len(table))[:, None]).sum().item() % MODULUS
    for _ in range(2):  # the second time from the feature cache
        answer = client.generate("What is it?", images=[encoded(i, "PNG") for i in images])
        rows, columns, found, num_ids, num_extra, largest = answer.token_ids
        assert (rows, columns) == (len(table) % MODULUS, table.shape[1])
        assert found == signs  # of every feature, weighted by its row: nothing is mixed up
        assert num_ids == num_extra == answer.num_input_tokens
        assert largest == (artifacts.spec().llm.vocab_size + len(table) - 1) % MODULUS


def test_a_question_without_a_picture_brings_one_row_of_zeros(client: Client) -> None:
    answer = client.generate("Hello")
    assert answer.token_ids[:3] == [1, 256, 0]


def test_answers_stream(client: Client) -> None:
    chunks = [chunk.token_ids for chunk in client.stream("Hello")]
    assert [len(ids) for ids in chunks] == [1] * 6
