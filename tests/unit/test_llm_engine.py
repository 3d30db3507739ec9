"""trtllm-build: its command line, what it leaves behind, and what its engine must be able to do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from build import pin
from build.llm_engine import build_llm_engine, engine_problem, trtllm_build_command
from export import export_llm
from internvl_triton.artifacts import LLMBuild
from internvl_triton.errors import EngineBuildFailed
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from tests.unit.gpu_fakes import TRTLLM_BUILD, write_program

ROOT = Path(__file__).parents[2]
LLM = LLMBuild("bf16", 2)
# Options of `trtllm-build`. Source: NVIDIA/TensorRT-LLM @ 008b2b8d tensorrt_llm/commands/build.py;
# plugin options: tensorrt_llm/plugin/plugin.py, PluginConfig, which becomes one flag a field.
KNOWN_FLAGS = {
    *("checkpoint_dir", "output_dir", "max_batch_size", "max_beam_width", "max_input_len"),
    *("max_seq_len", "max_num_tokens", "max_multimodal_len", "kv_cache_type", "workers"),
    *("output_timing_cache", "log_level"),
    *("tokens_per_block", "gemm_plugin", "gpt_attention_plugin", "context_fmha"),
    *("remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha"),
    *("use_fused_mlp", "multiple_profiles"),
}


def published(name: str) -> ModelSpec:
    return ModelSpec.from_config(published_config(name))


def test_the_command_line_of_26b_on_two_gpus() -> None:
    spec = published("InternVL2_5-26B")
    limits = Limits.for_model(spec, max_batch_size=16, max_seq_len=16384, max_tiles_per_request=40)
    command = trtllm_build_command(Path("C"), Path("E"), spec=spec, limits=limits, llm=LLM)
    assert " ".join(command) == (
        "trtllm-build --checkpoint_dir C --output_dir E"
        " --max_batch_size 16 --max_beam_width 1"
        " --max_input_len 16384 --max_seq_len 16384 --max_num_tokens 16384"
        " --max_multimodal_len 163840"  # 16 requests x 40 tiles x 256 tokens
        " --kv_cache_type paged --tokens_per_block 32"
        " --gemm_plugin auto --gpt_attention_plugin auto"
        " --context_fmha enable --remove_input_padding enable"
        " --use_paged_context_fmha enable --use_fp8_context_fmha disable"
        " --use_fused_mlp enable --multiple_profiles disable"
        " --output_timing_cache E/timing.cache --workers 2 --log_level info"
    )


@pytest.mark.parametrize(
    ("quant_algo", "fused"), [(None, "enable"), ("FP8", "enable"), ("W8A16", "disable")]
)
def test_quantised_weights_are_not_fused(quant_algo: str | None, fused: str) -> None:
    spec = published("InternVL2_5-8B")
    command = trtllm_build_command(
        *(Path("C"), Path("E")),
        spec=spec,
        limits=Limits.for_model(spec),
        llm=LLM,
        quant_algo=quant_algo,
    )
    assert command[command.index("--use_fused_mlp") + 1] == fused


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_one_request_of_the_batch_can_be_as_large_as_the_limits_say(name: str) -> None:
    spec = published(name)
    limits = Limits.for_model(spec)
    for tp_size in spec.llm.valid_tp_sizes:
        llm = LLMBuild("bf16", tp_size)
        command = trtllm_build_command(Path("C"), Path("E"), spec=spec, limits=limits, llm=llm)
        flags = dict(zip(command[1::2], command[2::2], strict=True))
        assert {flag.removeprefix("--") for flag in flags} == KNOWN_FLAGS
        assert int(flags["--workers"]) == tp_size
        # The engine's cap for one request is the table's size over the batch.
        per_request = int(flags["--max_multimodal_len"]) // int(flags["--max_batch_size"])
        assert per_request == limits.max_tiles_per_request * 256
        # Context is not chunked: the longest prompt passes through in one step.
        assert int(flags["--max_num_tokens"]) >= int(flags["--max_seq_len"]) == limits.max_seq_len


@pytest.fixture
def built(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that builds the engine of a small checkpoint with the fake trtllm-build."""
    write_program(tmp_path / "bin", "trtllm-build", TRTLLM_BUILD)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    spec = ModelSpec.from_checkpoint(checkpoints["qwen2"])
    checkpoint = tmp_path / "llm" / "checkpoint"
    export_llm(checkpoints["qwen2"], checkpoint, tp_size=2, precision="bf16", progress=False)

    def build(mode: str = "") -> tuple[Path, ModelSpec, Limits]:
        monkeypatch.setenv("FAKE_TRTLLM_BUILD", mode)
        engine, limits = tmp_path / "llm" / "engine", Limits.for_model(spec)
        build_llm_engine(checkpoint, engine, spec=spec, limits=limits, llm=LLM)
        return engine, spec, limits

    return build


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "llm").iterdir())


def test_an_engine_is_built_and_its_log_kept(built, tmp_path: Path, capfd) -> None:
    engine, spec, limits = built()
    names = sorted(path.name for path in engine.iterdir())
    assert names == ["config.json", "rank0.engine", "rank1.engine"]
    assert (engine / "rank0.engine").read_bytes() == b"engine"
    assert (
        engine_problem(engine, engine.parent / "checkpoint", spec=spec, limits=limits, llm=LLM)
        is None
    )
    assert left_over(tmp_path) == ["checkpoint", "engine", "trtllm-build.log"]
    said = "TensorRT-LLM version: 0.21.0"
    assert said in capfd.readouterr().out
    assert said in (tmp_path / "llm" / "trtllm-build.log").read_text()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "fail",
            r"exit code 1; the end of .*trtllm-build\.log:\n(line \d+\n){19}RuntimeError: CUDA",
        ),
        ("killed", r"signal 9 \(out of memory\?\)"),
        ("override", r"ended well, but .* has use_paged_context_fmha False, and True is needed"),
    ],
)
def test_a_failed_build_leaves_no_engine(built, tmp_path: Path, mode: str, message: str) -> None:
    built()
    with pytest.raises(EngineBuildFailed, match=message):
        built(mode)
    assert left_over(tmp_path) == ["checkpoint", "trtllm-build.log"]


def test_without_trtllm_build_the_error_names_the_container(
    built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineBuildFailed, match=f"not on PATH.*{pin.IMAGE}"):
        built()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_ends_the_compiler_and_leaves_no_engine(
    built, tmp_path: Path, how: signal.Signals
) -> None:
    built()
    program = f"""
import signal
from pathlib import Path
from build.llm_engine import build_llm_engine
from internvl_triton.artifacts import LLMBuild
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config
for number in (signal.SIGINT, signal.SIGTERM):  # as build.engines does
    signal.signal(number, signal.default_int_handler)
spec = ModelSpec.from_config(tiny_config("qwen2", "300m"))
root = Path({str(tmp_path / "llm")!r})
build_llm_engine(root / "checkpoint", root / "engine", spec=spec,
                 limits=Limits.for_model(spec), llm=LLMBuild("bf16", 2))
"""
    environment = {**os.environ, "FAKE_TRTLLM_BUILD": "hang"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )
    hanging = tmp_path / "llm" / "hanging"
    deadline = time.monotonic() + 60
    while not (hanging.is_file() and hanging.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    compiler = int(hanging.read_text())
    process.send_signal(how)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(compiler, 0)
    assert left_over(tmp_path) == ["checkpoint", "hanging", "trtllm-build.log"]


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("", {"version": "1.0.0"}, "engine is of TensorRT-LLM 1.0.0, and .* 0.21.0"),
        ("pretrained_config", {"mapping": {"tp_size": 4}}, "tp_size 4, and 2"),
        ("pretrained_config", {"vocab_size": 92553}, "vocab_size 92553, and 1283"),
        ("pretrained_config", {"dtype": "float16"}, "dtype float16, and bfloat16"),
        (
            "pretrained_config",
            {"quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None}},
            "quant_algo W8A16, and None",
        ),
        (
            "pretrained_config",
            {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
            "kv_cache_quant_algo FP8, and None",
        ),
        ("build_config", {"max_batch_size": 2048}, "max_batch_size 2048, and 8"),
        ("build_config", {"max_seq_len": 65536}, "max_seq_len 65536, and 32768"),
        ("build_config", {"max_num_tokens": 8192}, "max_num_tokens 8192, and at least 32768"),
        (
            "build_config",
            {"max_prompt_embedding_table_size": 16384},
            "max_multimodal_len per request 2048, and at least 16384",
        ),
        ("build_config", {"gather_context_logits": True}, "gather_context_logits True, and False"),
    ],
)
def test_engines_that_do_not_fit_are_named(built, section: str, values: dict, problem: str) -> None:
    engine, spec, limits = built()
    config = json.loads((engine / "config.json").read_text())
    (config[section] if section else config).update(values)
    (engine / "config.json").write_text(json.dumps(config))
    found = engine_problem(engine, engine.parent / "checkpoint", spec=spec, limits=limits, llm=LLM)
    assert found is not None
    assert re.search(problem, found), found


def test_missing_files_are_named(built) -> None:
    engine, spec, limits = built()
    (engine / "rank1.engine").unlink()
    problem = engine_problem(
        engine, engine.parent / "checkpoint", spec=spec, limits=limits, llm=LLM
    )
    assert problem is not None
    assert problem.endswith("rank1.engine is missing")
    (engine / "config.json").unlink()
    problem = engine_problem(
        engine, engine.parent / "checkpoint", spec=spec, limits=limits, llm=LLM
    )
    assert problem is not None
    assert problem.endswith("config.json is missing")
