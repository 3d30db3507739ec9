"""Step 1 of the ensemble: a question and its pictures to tiles, prompt ids and settings."""

import os

import triton_python_backend_utils as pb_utils

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.freed_memory import keep_freed_memory
from internvl_triton.preprocessing import DECODE, TILING, Preprocessor, Request, stop_rule
from internvl_triton.stage_metrics import StageMetrics, StageTimes
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.triton_adapter import announce_stops, answer_each, blobs, flag, text

MOST_THREADS = 4  # for one picture; more have nothing to do on most grids


class TritonPythonModel:
    def initialize(self, args):
        exit_with_server()
        keep_freed_memory()
        artifacts = Artifacts.of_model(args)
        self.preprocess = Preprocessor(
            artifacts.spec(),
            artifacts.limits(),
            load_tokenizer(artifacts.tokenizer_dir),
            threads=min(MOST_THREADS, len(os.sched_getaffinity(0))),
        )
        self.stages = StageMetrics(pb_utils, contract.PREPROCESSING.name, (DECODE, TILING))

    def execute(self, requests):
        return answer_each(pb_utils, requests, self._answer)

    def _answer(self, request):
        times = StageTimes()
        given = Request(
            text_input=text(pb_utils, request, contract.TEXT_INPUT),
            messages=text(pb_utils, request, contract.MESSAGES),
            images=blobs(pb_utils, request, contract.IMAGES),
            videos=blobs(pb_utils, request, contract.VIDEOS),
            sampling_parameters=text(pb_utils, request, contract.SAMPLING_PARAMETERS),
            stream=flag(pb_utils, request, contract.STREAM),
        )
        tensors = self.preprocess(given, times)
        # Who asks for anything less only wants to know what the request would cost.
        if contract.INPUT_IDS.name in request.requested_output_names():
            announce_stops(pb_utils, request.request_id(), stop_rule(given, tensors))
        self.stages.add(times)
        return tensors
