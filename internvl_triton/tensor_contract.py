"""Every tensor of the service: name, dtype and shape, spelled once.

Configs are rendered from it, model.py files and clients read and write by it. Names at the
boundary of `tensorrt_llm` are those of TensorRT-LLM 0.21's template (`triton_backend/all_models/
inflight_batcher_llm/tensorrt_llm/config.pbtxt`), verbatim.

Shapes are what a model sees in Triton's config: `tensorrt_llm` batches, so its tensors carry a
leading batch dimension on the wire, [1, ...] from this service; all others do not batch, but
`postprocessing` when a deployment asks for it (`batched`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from internvl_triton.top_log_probs import MAX_TOP_LOG_PROBS

__all__ = [
    "ENSEMBLE",
    "MODELS",
    "POSTPROCESSING",
    "PREPROCESSING",
    "TENSORRT_LLM",
    "VISION_ENCODER",
    "ModelContract",
    "Tensor",
    "gpu_models",
]

# Beginnings of error messages, which is all that tells the kinds apart inside a stream.
INVALID_REQUEST = "invalid request: "  # the caller can repair it
OVERLOADED = "overloaded: "  # the same request may succeed later
TIMED_OUT = "timed out: "  # the request's own timeout is over

DType = Literal["BOOL", "UINT8", "INT32", "UINT64", "FP32", "FP16", "BF16", "STRING"]


@dataclass(frozen=True)
class Tensor:
    """`dims` as in config.pbtxt, -1 for any length; `scalar` adds `reshape: { shape: [ ] }`."""

    name: str
    dtype: DType
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False
    scalar: bool = False

    def on_the_wire(self) -> Tensor:
        """The same tensor outside a batching model: a batch of one."""
        return Tensor(self.name, self.dtype, (1, *self.dims))


@dataclass(frozen=True)
class ModelContract:
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    def output(self, name: str) -> Tensor:
        return next(tensor for tensor in self.outputs if tensor.name == name)

    def batched(self) -> ModelContract:
        """The same model where Triton makes the batches: the inputs' first dimension is theirs.

        Ragged, so that requests share a batch whatever the lengths of their tensors.
        """
        inputs = tuple(replace(tensor, dims=tensor.dims[1:], ragged=True) for tensor in self.inputs)
        return replace(self, inputs=inputs)


def _optional_scalar(name: str, dtype: DType) -> Tensor:
    return Tensor(name, dtype, (1,), optional=True, scalar=True)


# --- tensorrt_llm: the part of the 0.21 template that this service uses -------------------------

INPUT_IDS = Tensor("input_ids", "INT32", (-1,), optional=True, ragged=True)
INPUT_LENGTHS = Tensor("input_lengths", "INT32", (1,), scalar=True)
REQUEST_OUTPUT_LEN = Tensor("request_output_len", "INT32", (1,), scalar=True)
END_ID = _optional_scalar("end_id", "INT32")
PAD_ID = _optional_scalar("pad_id", "INT32")
STOP_WORDS_LIST = Tensor("stop_words_list", "INT32", (2, -1), optional=True, ragged=True)
TEMPERATURE = _optional_scalar("temperature", "FP32")
RUNTIME_TOP_K = _optional_scalar("runtime_top_k", "INT32")
RUNTIME_TOP_P = _optional_scalar("runtime_top_p", "FP32")
REPETITION_PENALTY = _optional_scalar("repetition_penalty", "FP32")
PRESENCE_PENALTY = _optional_scalar("presence_penalty", "FP32")
FREQUENCY_PENALTY = _optional_scalar("frequency_penalty", "FP32")
MIN_TOKENS = _optional_scalar("min_tokens", "INT32")
SEED = _optional_scalar("seed", "UINT64")
RETURN_LOG_PROBS = _optional_scalar("return_log_probs", "BOOL")
RETURN_GENERATION_LOGITS = _optional_scalar("return_generation_logits", "BOOL")
RETURN_NUM_INPUT_TOKENS = _optional_scalar("return_num_input_tokens", "BOOL")
RETURN_NUM_OUTPUT_TOKENS = _optional_scalar("return_num_output_tokens", "BOOL")
EXCLUDE_INPUT_IN_OUTPUT = _optional_scalar("exclude_input_in_output", "BOOL")
STOP = _optional_scalar("stop", "BOOL")
STREAMING = _optional_scalar("streaming", "BOOL")
# Types: json_schema and regex; 0.21 knows json, ebnf_grammar and structural_tag as well.
GUIDED_DECODING_GUIDE_TYPE = Tensor(
    "guided_decoding_guide_type", "STRING", (1,), optional=True, ragged=True
)
GUIDED_DECODING_GUIDE = Tensor("guided_decoding_guide", "STRING", (1,), optional=True, ragged=True)
PROMPT_EMBEDDING_TABLE = Tensor(
    "prompt_embedding_table", "FP32", (-1, -1), optional=True, ragged=True
)
PROMPT_TABLE_EXTRA_IDS = Tensor(
    "prompt_table_extra_ids", "UINT64", (-1,), optional=True, ragged=True
)

OUTPUT_IDS = Tensor("output_ids", "INT32", (-1, -1))
SEQUENCE_LENGTH = Tensor("sequence_length", "INT32", (-1,))
OUTPUT_LOG_PROBS = Tensor("output_log_probs", "FP32", (-1, -1))
# Of the new tokens, before temperature and penalties; only when asked for. Streamed [1, 1, vocab]
# for each token; otherwise [1, n, vocab], n at least the answer's length. The vocabulary is padded.
GENERATION_LOGITS = Tensor("generation_logits", "FP32", (-1, -1, -1))
NUM_INPUT_TOKENS = Tensor("num_input_tokens", "INT32", (1,))
NUM_OUTPUT_TOKENS = Tensor("num_output_tokens", "INT32", (1,))
# Not in the template: the CPU engine reports a failure as data, because an error response
# behind a decoupled step leaks the ensemble's request. The GPU backend has no such output.
ERROR = Tensor("error", "STRING", (1,))

TENSORRT_LLM = ModelContract(
    "tensorrt_llm",
    inputs=(
        INPUT_IDS,
        INPUT_LENGTHS,
        REQUEST_OUTPUT_LEN,
        END_ID,
        PAD_ID,
        STOP_WORDS_LIST,
        TEMPERATURE,
        RUNTIME_TOP_K,
        RUNTIME_TOP_P,
        REPETITION_PENALTY,
        MIN_TOKENS,
        PRESENCE_PENALTY,
        FREQUENCY_PENALTY,
        SEED,
        RETURN_LOG_PROBS,
        RETURN_GENERATION_LOGITS,
        RETURN_NUM_INPUT_TOKENS,
        RETURN_NUM_OUTPUT_TOKENS,
        EXCLUDE_INPUT_IN_OUTPUT,
        STOP,
        STREAMING,
        PROMPT_EMBEDDING_TABLE,
        PROMPT_TABLE_EXTRA_IDS,
        GUIDED_DECODING_GUIDE_TYPE,
        GUIDED_DECODING_GUIDE,
    ),
    outputs=(
        OUTPUT_IDS,
        SEQUENCE_LENGTH,
        OUTPUT_LOG_PROBS,
        GENERATION_LOGITS,
        NUM_INPUT_TOKENS,
        NUM_OUTPUT_TOKENS,
        ERROR,
    ),
)

# --- the steps around it ------------------------------------------------------------------------

TEXT_INPUT = Tensor("text_input", "STRING", (1,), optional=True)
MESSAGES = Tensor("messages", "STRING", (1,), optional=True)
IMAGES = Tensor("images", "STRING", (-1,), optional=True)
VIDEOS = Tensor("videos", "STRING", (-1,), optional=True)
SAMPLING_PARAMETERS = Tensor("sampling_parameters", "STRING", (1,), optional=True)
STREAM = Tensor("stream", "BOOL", (1,), optional=True)

TILE_SIZE = 448
TILES = Tensor("tiles", "UINT8", (-1, TILE_SIZE, TILE_SIZE, 3))
IMAGE_DIGESTS = Tensor("image_digests", "UINT64", (-1, 2))
TILES_PER_IMAGE = Tensor("tiles_per_image", "INT32", (-1,))

PREPROCESSING = ModelContract(
    "preprocessing",
    inputs=(TEXT_INPUT, MESSAGES, IMAGES, VIDEOS, SAMPLING_PARAMETERS, STREAM),
    outputs=(
        TILES,
        IMAGE_DIGESTS,
        TILES_PER_IMAGE,
        *(
            tensor.on_the_wire()
            for tensor in TENSORRT_LLM.inputs
            if tensor not in (STOP, PROMPT_EMBEDDING_TABLE)
        ),
    ),
)

VISION_ENCODER = ModelContract(
    "vision_encoder",
    inputs=(TILES, IMAGE_DIGESTS, TILES_PER_IMAGE),
    outputs=(PROMPT_EMBEDDING_TABLE.on_the_wire(),),
)

TEXT_OUTPUT = Tensor("text_output", "STRING", (1,))
ANSWER_IDS = Tensor("output_ids", "INT32", (-1,))
LOG_PROBS = Tensor("log_probs", "FP32", (-1,))
# Alternatives of each token, most likely first: (n, 20), or (0, 20) when not asked for.
TOP_TOKEN_IDS = Tensor("top_token_ids", "INT32", (-1, MAX_TOP_LOG_PROBS))
TOP_LOG_PROBS = Tensor("top_log_probs", "FP32", (-1, MAX_TOP_LOG_PROBS))
# A request parameter, which Triton hands on to every step. True leaves out of each response what a
# caller can do without: error and stopped when there is nothing to tell, num_output_tokens,
# num_input_tokens behind the first response of a request id, and the log-probs that were not asked
# for. Otherwise the last step makes all outputs of the ensemble, whichever the caller requests, and
# each costs every token time.
BRIEF = "brief"
STOPPED = Tensor("stopped", "BOOL", (1,))  # a stop string was found: the answer ends here
# Announces a request with stop strings, before its first chunk: JSON of stop_strings.StopRule.
STOP_RULE = Tensor("stop_rule", "STRING", (-1, 1), optional=True)

POSTPROCESSING = ModelContract(
    "postprocessing",
    inputs=(
        Tensor("output_ids", "INT32", (-1, -1, -1)),
        Tensor("sequence_length", "INT32", (-1, -1)),
        Tensor("output_log_probs", "FP32", (-1, -1, -1), optional=True),
        Tensor("generation_logits", "FP32", (-1, -1, -1, -1), optional=True),
        Tensor("num_input_tokens", "INT32", (-1, 1)),
        Tensor("error", "STRING", (-1, 1), optional=True),
        STOP_RULE,
    ),
    outputs=(
        TEXT_OUTPUT,
        ANSWER_IDS,
        NUM_INPUT_TOKENS,
        NUM_OUTPUT_TOKENS,
        LOG_PROBS,
        TOP_TOKEN_IDS,
        TOP_LOG_PROBS,
        STOPPED,
        ERROR,
    ),
)

ENSEMBLE = ModelContract("internvl", PREPROCESSING.inputs, POSTPROCESSING.outputs)

MODELS = (PREPROCESSING, VISION_ENCODER, TENSORRT_LLM, POSTPROCESSING)


def gpu_models(table_dtype: DType) -> tuple[ModelContract, ...]:
    """MODELS as the GPU serves them: visual features in the dtype of the language model's engine,
    and nothing at `tensorrt_llm` that TensorRT-LLM's backend does not have."""

    def typed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        name = PROMPT_EMBEDDING_TABLE.name
        return tuple(
            replace(tensor, dtype=table_dtype) if tensor.name == name else tensor
            for tensor in tensors
        )

    outputs = tuple(tensor for tensor in TENSORRT_LLM.outputs if tensor is not ERROR)
    vision = replace(VISION_ENCODER, outputs=typed(VISION_ENCODER.outputs))
    llm = replace(TENSORRT_LLM, inputs=typed(TENSORRT_LLM.inputs), outputs=outputs)
    return (PREPROCESSING, vision, llm, POSTPROCESSING)
