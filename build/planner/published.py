"""The published throughput of TensorRT-LLM engines, and what the planner says about each row.

Rows are split by the lengths of their requests: those of `CALIBRATION_SHAPES` were fitted, and no
constant saw a number of the others, which are the shapes nearest to a picture and its answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from build.planner.calibration import CALIBRATED, Calibration
from build.planner.gpus import GPUS
from build.planner.llm_time import LLMTime
from build.planner.max_load import max_load
from build.planner.precisions import KV_CACHES, PRECISIONS
from build.planner.weights import kv_bytes_per_token, rank_weights
from internvl_triton.model_spec import LLMSpec

__all__ = [
    "CALIBRATION_SHAPES",
    "PublishedRow",
    "benchmark_batch_size",
    "error",
    "llama",
    "median_error",
    "predicted_tokens_per_s",
    "published_rows",
    "published_source",
]

DATA = Path(__file__).with_name("published_throughput.json")
CALIBRATION_SHAPES = ((128, 128), (128, 2048), (2048, 2048), (20000, 2000))  # input, output
BLOCK_TOKENS = 32  # of the paged KV cache
KV_FRACTION = 0.9  # of what is free: the default of trtllm-bench
MAX_BATCH_SIZE = 2048  # the default of trtllm-build
# Activations at trtllm-build's default max_num_tokens 8192, CUDA context and NCCL buffers.
OTHER_BYTES = 2e9


@dataclass(frozen=True)
class PublishedRow:
    model: str
    llm: LLMSpec
    tp_size: int
    column: str
    gpu: str
    precision: str
    kv_cache: str
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float

    @property
    def is_held_out(self) -> bool:
        return (self.input_tokens, self.output_tokens) not in CALIBRATION_SHAPES


def published_source() -> str:
    return str(_data()["source"])


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    data = _data()
    rows = []
    for table in data["tables"]:
        llm = llama(data["models"][table["model"]])
        for input_tokens, output_tokens, *values in table["rows"]:
            for column, value in zip(table["columns"], values, strict=True):
                rows.append(
                    PublishedRow(
                        model=table["model"],
                        llm=llm,
                        tp_size=table["tp_size"],
                        column=column,
                        **data["columns"][column],
                        input_tokens=input_tokens,
                        output_tokens=output_tokens,
                        output_tokens_per_s=float(value),
                    )
                )
    return tuple(rows)


def predicted_tokens_per_s(row: PublishedRow, calibration: Calibration = CALIBRATED) -> float:
    """Output tokens per second of the whole machine at maximum load."""
    llm = LLMTime(
        row.llm,
        gpu=GPUS[row.gpu],
        tp_size=row.tp_size,
        precision=PRECISIONS[row.precision],
        kv_cache=row.kv_cache,
        calibration=calibration,
    )
    load = max_load(
        llm,
        batch_size=benchmark_batch_size(row),
        prompt_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
    )
    return load.output_tokens_per_s


@cache
def benchmark_batch_size(row: PublishedRow) -> int:
    """How many whole requests the KV cache of the benchmark holds, at most MAX_BATCH_SIZE."""
    weights = rank_weights(
        row.llm, tp_size=row.tp_size, precision=PRECISIONS[row.precision]
    ).total_bytes
    per_token = kv_bytes_per_token(
        row.llm, tp_size=row.tp_size, bytes_per_value=KV_CACHES[row.kv_cache]
    )
    free = GPUS[row.gpu].memory_bytes - weights - OTHER_BYTES
    tokens = row.input_tokens + row.output_tokens
    reserved = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
    return max(1, min(MAX_BATCH_SIZE, int(free * KV_FRACTION / per_token / reserved)))


def error(row: PublishedRow, calibration: Calibration = CALIBRATED) -> float:
    """|predicted / published - 1|."""
    return abs(predicted_tokens_per_s(row, calibration) / row.output_tokens_per_s - 1)


def median_error(rows: Sequence[PublishedRow], calibration: Calibration = CALIBRATED) -> float:
    return median(error(row, calibration) for row in rows)


def llama(shape: dict[str, int]) -> LLMSpec:
    """Llama is InternLM2 with its weights in another order: no biases, an untied head."""
    return LLMSpec(
        family="internlm2",
        head_dim=shape["hidden_size"] // shape["num_heads"],
        rope_theta=500000.0,
        norm_eps=1e-5,
        max_position_embeddings=131072,
        **shape,
    )


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return data
