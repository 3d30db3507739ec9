"""The vision step without an engine: features of the right shape, all zero."""

import json

import numpy as np

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.triton_adapter import answer_each, array


class TritonPythonModel:
    def initialize(self, args):
        import triton_python_backend_utils as pb_utils  # only in the server's own process

        exit_with_server()
        self.pb_utils = pb_utils
        spec = Artifacts.of_model(args).spec()
        outputs = json.loads(args["model_config"])["output"]
        assert outputs[0]["name"] == contract.PROMPT_EMBEDDING_TABLE.name
        self.tokens_per_tile = spec.tokens_per_tile
        self.hidden_size = spec.llm.hidden_size

    def execute(self, requests):
        return answer_each(self.pb_utils, requests, self._answer)

    def _answer(self, request):
        rows = max(1, len(array(self.pb_utils, request, contract.TILES)) * self.tokens_per_tile)
        table = np.zeros((1, rows, self.hidden_size), np.float32)
        return {contract.PROMPT_EMBEDDING_TABLE.name: table}
