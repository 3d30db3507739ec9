"""Step 2 of the ensemble: tiles to visual features, the table that virtual token ids select."""

import triton_python_backend_utils as pb_utils

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts
from internvl_triton.feature_cache import FeatureCache, VisionEncoder
from internvl_triton.step_metrics import VISION_COUNTERS, StepMetrics
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.triton_adapter import answer_each, array, parameters
from internvl_triton.vision_runtime import load_vision_engine


class TritonPythonModel:
    def initialize(self, args):
        exit_with_server()
        artifacts = Artifacts.of_model(args)
        self.encoder = VisionEncoder(
            load_vision_engine(artifacts, parameters(args)),
            FeatureCache(artifacts.limits().feature_cache_bytes),
        )
        self.metrics = StepMetrics(
            pb_utils,
            contract.VISION_ENCODER.name,
            lambda: self.encoder.totals,
            counters=VISION_COUNTERS,
        )

    def execute(self, requests):
        return answer_each(pb_utils, requests, self._answer)

    def _answer(self, request):
        encoded = self.encoder.encode(
            array(pb_utils, request, contract.TILES),
            array(pb_utils, request, contract.TILES_PER_IMAGE),
            array(pb_utils, request, contract.IMAGE_DIGESTS),
        )
        self.metrics.publish()
        return {contract.PROMPT_EMBEDDING_TABLE.name: encoded.features[None]}
