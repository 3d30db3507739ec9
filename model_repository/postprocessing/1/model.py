"""Step 4 of the ensemble: generated ids to the bytes of the answer."""

import triton_python_backend_utils as pb_utils

from internvl_triton.artifacts import Artifacts
from internvl_triton.postprocessing import Postprocessor
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.triton_adapter import (
    SmallTensors,
    StopOnCancel,
    add_batch_dimension,
    answer_each,
    arrays,
    is_batching,
    is_brief,
    stop_generation,
)


class TritonPythonModel:
    def initialize(self, args):
        exit_with_server()
        artifacts = Artifacts.of_model(args)
        self.postprocess = Postprocessor(
            load_tokenizer(artifacts.tokenizer_dir).token_bytes,
            lambda request_id: stop_generation(pb_utils, request_id),
            vocab_size=artifacts.spec().llm.vocab_size,
        )
        self.batching = is_batching(args)
        self.stop_on_cancel = StopOnCancel(pb_utils)
        self.tensor = SmallTensors(pb_utils)

    def execute(self, requests):
        for request in requests:
            self.stop_on_cancel(request)
        return answer_each(pb_utils, requests, self._answer, self.tensor)

    def _answer(self, request):
        tensors = arrays(request)
        if is_brief(request):
            outputs = self.postprocess(tensors, request.request_id(), brief=True)
        else:
            wanted = request.requested_output_names()
            outputs = self.postprocess(tensors, request.request_id(), wanted=wanted)
        return add_batch_dimension(outputs) if self.batching else outputs
