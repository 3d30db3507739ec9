"""The language model's engine alone, by NVIDIA's `trtllm-bench`: what goes in and what comes out.

Read in `tensorrt_llm/` of NVIDIA/TensorRT-LLM at 0.20 and in the weeks before and after 0.21 was
branched off, not at its tag. What differs between those states is told apart by `--help`.

- Flags: `commands/bench.py`, `bench/benchmark/{low_latency,throughput}.py`. As long as engines are
  the default, `--backend` has no name for them and is left out. After that (release notes of 1.0)
  the default is PyTorch, and they are called "tensorrt", at first "cpp".
- Requests: `bench/utils/data.py`, `create_dataset_from_stream`: a JSON object a line. `input_ids`
  are taken as they are, whatever they mean; answers have exactly `output_tokens` tokens, because
  both commands set the end id to -1.
- Report: `bench/dataclasses/reporting.py`, `get_statistics_dict`; times in ms, means over requests.
  `latency` always streams, `throughput` with `--streaming`: only then there are TTFT and TPOT.
- KV cache reuse is off (`bench/dataclasses/configuration.py`), 90 % of the free memory is KV cache.
- `latency` sets max_batch_size 1 and CUDA graphs, which the service does not use.

An engine with a prompt table runs requests without one: `batch_manager/promptTuningBuffers.cpp`,
`fill`, marks them as such. Ids must be below vocab_size: those above select rows of the table. Text
ids in the places of visual tokens cost what these cost, a row is looked up either way; what is left
out are the copies of every request's table into the engine's, which `fill` makes in every step.

TP: the mapping is read from the engine, and on one machine the LLM API starts its own workers
(`llmapi/mpi_session.py`, MpiPoolSession): no mpirun, no --tp.

Beside an engine it wants a Hugging Face directory: `--model_path`. Of that, an engine run takes
the config's model_type and sizes, the number of parameters in the header of the safetensors file
(`bench/build/dataclasses.py`) and the tokenizer's pad token; nothing is computed from them. So it
gets a stand-in, and no weights have to be exported for it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import LLMSpec

__all__ = [
    "PROGRAM",
    "Case",
    "LlmTime",
    "command_line",
    "engine_options",
    "read_help",
    "read_report",
    "request_lines",
    "write_stand_in",
]

PROGRAM = "trtllm-bench"
# What releases call engines in --backend, if they have a name for them.
ENGINE_BACKENDS = ("tensorrt", "trt", "cpp")
FLAGS = ("--engine_dir", "--dataset", "--num_requests", "--warmup", "--concurrency")
HELP_TIMEOUT_S = 300.0  # it imports all of TensorRT-LLM
LAST_LINES = 20


@dataclass(frozen=True)
class Case:
    """One run. concurrency: requests at a time; `latency` takes one after the other."""

    command: Literal["latency", "throughput"]
    num_tiles: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    warm_up: int = 2

    @property
    def name(self) -> str:
        return f"{self.command}-{self.num_tiles}-tiles-{self.concurrency}-at-a-time"

    @property
    def flags(self) -> tuple[str, ...]:
        """The command's flags that are used."""
        streaming = ("--streaming",) if self.command == "throughput" else ()
        return (*FLAGS, "--report_json", *streaming)


@dataclass(frozen=True)
class LlmTime:
    """Of all requests of a run: means of TTFT and TPOT, and output tokens per second."""

    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    output_tokens_per_s: float


def request_lines(case: Case, *, vocab_size: int, seed: int = 0) -> list[str]:
    """The dataset: `requests` prompts of random ids below vocab_size, all different."""
    random = np.random.default_rng(seed)
    prompts = random.integers(0, vocab_size, (case.requests, case.prompt_tokens))
    return [
        json.dumps({"task_id": number, "input_ids": ids, "output_tokens": case.output_tokens})
        for number, ids in enumerate(prompts.tolist())
    ]


def write_stand_in(folder: Path, spec: LLMSpec, *, dtype: str) -> Path:
    """A directory with config.json, tokenizer and one parameter, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<pad>"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    header = json.dumps({"parameter": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    length = len(header).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(length + header.encode() + bytes(4))
    return folder


def read_help(program: str, command: str) -> str:
    """What `--help` says of one of its commands. Raises BuildFailed when it says nothing."""
    asked = [program, "--model", "engine", command, "--help"]
    try:
        done = subprocess.run(
            asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=HELP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(
            f"`{PROGRAM} {command} --help` did not answer within {HELP_TIMEOUT_S:g} s"
        ) from error
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise BuildFailed(
            f"`{PROGRAM} {command} --help` ended with exit code {done.returncode}; its last "
            f"lines:\n{last}"
        )
    return done.stdout


def engine_options(case: Case, help_text: str) -> list[str]:
    """What makes this release run an engine: [] or ["--backend", ...].

    Raises BuildFailed when the command has not all flags that are needed.
    """
    known = set(re.findall(r"--[a-z][a-z_]*", help_text))
    if missing := [flag for flag in case.flags if flag not in known]:
        raise BuildFailed(
            f"`{PROGRAM} {case.command}` of this TensorRT-LLM has no {', '.join(missing)}; it is "
            "used as in 0.21, the release of the gpu profile's container"
        )
    found = re.search(r"--backend\s+\[([^\]]*)\]", help_text)
    choices = re.split(r"[|\s]+", found[1]) if found else []
    names = [name for name in ENGINE_BACKENDS if name in choices]
    return ["--backend", names[0]] if names else []


def command_line(
    program: str,
    case: Case,
    *,
    model: str,
    stand_in: Path,
    engine: Path,
    dataset: Path,
    report: Path,
    options: Sequence[str] = (),
) -> list[str]:
    """What is run. options: those of `engine_options`."""
    values: dict[str, object] = {
        "--engine_dir": engine,
        "--dataset": dataset,
        "--num_requests": case.requests,
        "--warmup": case.warm_up,
        "--concurrency": case.concurrency,
        "--report_json": report,
    }
    return [
        *(program, "--model", model, "--model_path", str(stand_in)),
        *("--workspace", str(stand_in.parent), case.command, *options),
        *(text for flag, value in values.items() for text in (flag, str(value))),
        *(("--streaming",) if case.command == "throughput" else ()),
    ]


def read_report(path: Path, case: Case) -> LlmTime:
    """The numbers of a run.

    Raises BuildFailed when the file is no report, is one of another backend, or lacks requests.
    """
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildFailed(f"{PROGRAM} ended well, but wrote no report: {path} is missing") from None
    except ValueError as error:
        raise BuildFailed(
            f"{path} is no JSON ({error}); {PROGRAM} should have written it"
        ) from error
    backend = _value(report, path, "engine", "backend", kind=str)
    if backend != "TRT":
        raise BuildFailed(
            f"{PROGRAM} ran its backend {backend!r} instead of the engine: see {path}"
        )
    answered = _value(report, path, "request_info", "num_requests", kind=int)
    if answered != case.requests:
        raise BuildFailed(
            f"{answered} of {case.requests} requests were answered; the log beside {path} says why"
        )
    return LlmTime(
        ttft_ms=_value(report, path, "streaming_metrics", "avg_ttft_ms"),
        ttft_p99_ms=_value(report, path, "streaming_metrics", "ttft_percentiles", "p99"),
        tpot_ms=_value(report, path, "streaming_metrics", "avg_tpot_ms"),
        output_tokens_per_s=_value(report, path, "performance", "system_output_throughput_tok_s"),
    )


def _value(report: Any, path: Path, *keys: str, kind: type = float) -> Any:
    """report[keys[0]][keys[1]]..., checked. Numbers are above 0."""
    value = report
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    numbers = (int, float) if kind is float else (kind,)
    usable = isinstance(value, numbers) and not isinstance(value, bool)
    if not usable or (kind is not str and not 0 < value < float("inf")):
        raise BuildFailed(
            f"{path} is not a report as of TensorRT-LLM 0.21: {'.'.join(keys)} is {value!r}"
        )
    return value
