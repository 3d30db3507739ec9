"""Published numbers of other kinds, which no constant was fitted to: first tokens, and InternVL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build.planner.calibration import CALIBRATED
from build.planner.gpus import GPUS
from build.planner.llm_time import LLMTime
from build.planner.max_load import max_load
from build.planner.precisions import PRECISIONS
from build.planner.published import llama
from build.planner.vision_time import vision_s
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import published_config

__all__ = ["Comparison", "first_tokens", "served_internvl"]

DATA = Path(__file__).with_name("published_latency.json")


@dataclass(frozen=True)
class Comparison:
    """Both numbers in the unit that `what` names."""

    what: str
    published: float
    predicted: float
    source: str


def first_tokens() -> Iterator[Comparison]:
    """Seconds to the first token of one request."""
    data = json.loads(DATA.read_text(encoding="utf-8"))["first_token"]
    for row in data["rows"]:
        llm = LLMTime(
            llama(data["models"][row["model"]]),
            gpu=GPUS[row["gpu"]],
            tp_size=row["tp_size"],
            precision=PRECISIONS[row["precision"]],
            kv_cache="auto",
            calibration=CALIBRATED,
        )
        engine = f"{row['model']} TP{row['tp_size']}, {row['gpu']}, {row['precision']}"
        predicted_s = llm.prefill(data["input_tokens"]).total_s
        yield Comparison(
            f"{engine}: first token, s", row["published_s"], predicted_s, data["source"]
        )


def served_internvl() -> Iterator[Comparison]:
    """Prompt and output tokens per second of a whole service."""
    data = json.loads(DATA.read_text(encoding="utf-8"))["served"]
    spec = ModelSpec.from_config(published_config(data["model"]))
    gpu, output_tokens = GPUS[data["gpu"]], data["output_tokens"]
    prompt_tokens = data["text_tokens"] + data["num_tiles"] * spec.tokens_per_tile
    llm = LLMTime(
        spec.llm,
        gpu=gpu,
        tp_size=1,
        precision=PRECISIONS[data["precision"]],
        kv_cache="auto",
        calibration=CALIBRATED,
    )
    for row in data["rows"]:
        load = max_load(
            llm,
            batch_size=row["concurrency"],
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vision_s_per_request=vision_s(spec, data["num_tiles"], gpu=gpu, calibration=CALIBRATED),
        )
        yield Comparison(
            f"{data['model']}, {gpu.name}, {row['concurrency']} at once: all tokens/s",
            row["published_total_tokens_per_s"],
            load.requests_per_s * (prompt_tokens + output_tokens),
            data["source"],
        )
