"""TensorRT-LLM checkpoint -> engine, by NVIDIA's `trtllm-build`.

Flags and the engine's config.json as in TensorRT-LLM 0.21: `tensorrt_llm/commands/build.py`,
`tensorrt_llm/builder.py` and `tensorrt_llm/plugin/plugin.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from build import pin
from build.logged_program import run_logged
from internvl_triton.artifacts import LLMBuild
from internvl_triton.errors import EngineBuildFailed
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["build_llm_engine", "engine_problem", "trtllm_build_command"]

PROGRAM = "trtllm-build"


def trtllm_build_command(
    checkpoint: Path,
    output: Path,
    *,
    spec: ModelSpec,
    limits: Limits,
    llm: LLMBuild,
    quant_algo: str | None = None,
    kv_cache_quant_algo: str | None = None,
) -> list[str]:
    """The command line, every flag that shapes the engine explicit.

    quant_algo, kv_cache_quant_algo: of the checkpoint's config.json. 0.21 (`builder.py`) fuses the
    MLP of no quantised weights but FP8, has no paged context FMHA with an int8 KV cache or with an
    fp8 one beside other weights, and wants fp8 context FMHA for fp8 weights and KV cache.

    max_multimodal_len is for the whole batch: one request may use max_multimodal_len /
    max_batch_size rows (`promptTuningBuffers.cpp`, mMaxPromptVocabSize).
    max_num_tokens is a whole prompt: context is not chunked.
    """
    fp8_attention = quant_algo == kv_cache_quant_algo == "FP8"
    paged = kv_cache_quant_algo is None or fp8_attention
    flags: dict[str, object] = {
        "checkpoint_dir": checkpoint,
        "output_dir": output,
        "max_batch_size": limits.max_batch_size,
        "max_beam_width": 1,
        "max_input_len": limits.max_seq_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_seq_len,
        "max_multimodal_len": limits.max_batch_size * limits.max_visual_tokens(spec),
        "kv_cache_type": "paged",
        "tokens_per_block": 32,
        "gemm_plugin": "auto",
        "gpt_attention_plugin": "auto",
        "context_fmha": "enable",
        "remove_input_padding": "enable",
        "use_paged_context_fmha": "enable" if paged else "disable",  # KV reuse needs it
        "use_fp8_context_fmha": "enable" if fp8_attention else "disable",
        "use_fused_mlp": "enable" if quant_algo in (None, "FP8") else "disable",
        "multiple_profiles": "disable",
        "output_timing_cache": output / "timing.cache",  # its default is the working directory
        "workers": llm.tp_size,
        "log_level": "info",
    }
    return [PROGRAM, *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]


def build_llm_engine(
    checkpoint: Path, engine: Path, *, spec: ModelSpec, limits: Limits, llm: LLMBuild
) -> None:
    """Write the directory `engine`: config.json and rank0.engine .. rank<tp-1>.engine.

    Everything that trtllm-build says is printed and kept in `trtllm-build.log` beside it. The
    directory appears only when the engine is complete and does what was asked for.

    Raises EngineBuildFailed with the end of the log, or with what the engine lacks.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise EngineBuildFailed(
            f"{PROGRAM} is not on PATH; it is part of TensorRT-LLM {pin.TENSORRT_LLM}: run "
            f"`make engines` with docker, or inside {pin.IMAGE}"
        )
    unfinished = engine.with_name(engine.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(engine, ignore_errors=True)
    unfinished.mkdir(parents=True)
    log_path = engine.with_name(f"{PROGRAM}.log")
    quantization = _read(checkpoint)["quantization"]
    command = trtllm_build_command(
        checkpoint,
        unfinished,
        spec=spec,
        limits=limits,
        llm=llm,
        quant_algo=quantization["quant_algo"],
        kv_cache_quant_algo=quantization["kv_cache_quant_algo"],
    )
    try:
        run_logged(PROGRAM, [program, *command[1:]], log_path)
        problem = engine_problem(unfinished, checkpoint, spec=spec, limits=limits, llm=llm)
        if problem:
            raise EngineBuildFailed(f"{PROGRAM} ended well, but {problem} (log: {log_path})")
        os.replace(unfinished, engine)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def engine_problem(
    engine: Path, checkpoint: Path, *, spec: ModelSpec, limits: Limits, llm: LLMBuild
) -> str | None:
    """What keeps the engine, built from `checkpoint`, from serving `limits`: a clause, or None.

    The builder changes some settings with a warning only, so the config that it wrote is read.
    """
    if not (engine / "config.json").is_file():
        return f"{engine / 'config.json'} is missing"
    config, converted = _read(engine), _read(checkpoint)
    pretrained, build = config["pretrained_config"], config["build_config"]
    if config["version"] != pin.TENSORRT_LLM:
        return (
            f"the language model's engine is of TensorRT-LLM {config['version']}, and this "
            f"release serves {pin.TENSORRT_LLM}"
        )
    equal: list[tuple[str, Any, Any]] = [
        ("tp_size", pretrained["mapping"]["tp_size"], llm.tp_size),
        ("vocab_size", pretrained["vocab_size"], spec.llm.vocab_size),
        ("hidden_size", pretrained["hidden_size"], spec.llm.hidden_size),
        ("dtype", pretrained["dtype"], converted["dtype"]),
        *(
            (key, pretrained["quantization"][key], converted["quantization"][key])
            for key in ("quant_algo", "kv_cache_quant_algo")
        ),
        ("max_batch_size", build["max_batch_size"], limits.max_batch_size),
        ("max_seq_len", build["max_seq_len"], limits.max_seq_len),
        ("max_beam_width", build["max_beam_width"], 1),
        ("gather_context_logits", bool(build["gather_context_logits"]), False),  # ends KV reuse
    ]
    features = ["context_fmha", "remove_input_padding"]
    if llm.kv_cache is None:  # KV reuse is on for these alone: `GpuDeployment`
        features.append("use_paged_context_fmha")
    for feature in features:
        equal.append((feature, build["plugin_config"][feature], True))
    for name, found, wanted in equal:
        if found != wanted:
            return f"the language model's engine has {name} {found}, and {wanted} is needed"
    per_request = build["max_prompt_embedding_table_size"] // build["max_batch_size"]
    for name, found, wanted in (
        ("max_num_tokens", build["max_num_tokens"], limits.max_seq_len),
        ("max_multimodal_len per request", per_request, limits.max_visual_tokens(spec)),
    ):
        if found < wanted:
            return (
                f"the language model's engine has {name} {found}, and at least {wanted} is needed"
            )
    missing = [
        name
        for rank in range(llm.tp_size)
        if not (engine / (name := f"rank{rank}.engine")).is_file()
    ]
    return f"{engine / missing[0]} is missing" if missing else None


def _read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
