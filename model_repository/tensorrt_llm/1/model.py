"""Step 3 of the ensemble on the CPU: the `tensorrtllm` backend's tensor contract, decoupled."""

import json
from dataclasses import asdict

import triton_python_backend_utils as pb_utils

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.cpu_llm import GENERATION_STAGES, CpuLlmEngine
from internvl_triton.llm_tensors import chunk_tensors, generation_request
from internvl_triton.stage_metrics import StageMetrics
from internvl_triton.step_metrics import LLM_COUNTERS, LLM_GAUGES, StepMetrics
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.triton_adapter import CancelCheck, arrays, flag, log_exception, response

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        exit_with_server()
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        artifacts = Artifacts.of_model(args)
        self.engine = CpuLlmEngine(
            artifacts.root / parameters["llm_checkpoint"],
            max_batch_size=config["max_batch_size"],
            max_seq_len=int(parameters["max_seq_len"]),
            max_visual_tokens=int(parameters["max_visual_tokens"]),
            max_queue_size=int(parameters["max_queue_size"]),
            prefix_cache_bytes=int(parameters["prefix_cache_bytes"]),
            tokenizer=load_tokenizer(artifacts.tokenizer_dir),
            on_change=lambda: self.metrics.publish(),
        )
        self.metrics = StepMetrics(
            pb_utils,
            contract.TENSORRT_LLM.name,
            lambda: asdict(self.engine.stats()),
            counters=LLM_COUNTERS,
            gauges=LLM_GAUGES,
        )
        self.stages = StageMetrics(pb_utils, contract.TENSORRT_LLM.name, GENERATION_STAGES)

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except Exception as error:  # noqa: BLE001 - every request gets its final response
                log_exception(pb_utils, error)
                failure = pb_utils.TritonError("the request's tensors do not fit the contract")
                sender.send(pb_utils.InferenceResponse(error=failure), flags=FINAL)

    def _start(self, request, sender):
        if flag(pb_utils, request, contract.STOP):
            self.engine.stop(request.request_id())
            sender.send(flags=FINAL)
            return
        generation = generation_request(
            arrays(request),
            request_id=request.request_id(),
            is_cancelled=CancelCheck(sender.is_cancelled),
            timeout_s=request.timeout() / 1e6,  # Triton copies the ensemble's to every step
        )

        def send(chunk):
            tensors = chunk_tensors(chunk, generation)
            flags = FINAL if chunk.final else 0
            sender.send(response(pb_utils, tensors), flags=flags)
            if chunk.times:
                self.stages.add(chunk.times.by_stage())

        self.engine.submit(generation, send)

    def finalize(self):
        self.engine.close()
