"""Engines alone: clocks, trtllm-bench's input, command line and report, and what is said of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import trtllm_bench
from benchmarks.engine_only import llm_cases, main, run_llm
from benchmarks.engine_tables import llm_floors, llm_rows, vision_rows
from benchmarks.trtllm_bench import Case, LlmTime
from benchmarks.vision_engine_time import VisionTime, tile_counts, time_cuda_engine
from build.measured import MeasuredBuild
from build.plan import make_plan, spec_of
from build.planner.floors import Floors, floors_of
from build.planner.gpus import GPUS
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.limits import Limits
from internvl_triton.random_checkpoint import tiny_config
from tests.unit.gpu_fakes import DOCKER, NVIDIA_SMI, write_program

ROOT = Path(__file__).parents[2]
SPEC_8B = spec_of("InternVL2_5-8B")
CASE = Case("throughput", 13, 3392, 128, concurrency=8, requests=32)

# What the command says in releases where engines are the default, and where PyTorch is.
HELP = """Usage: trtllm-bench throughput [OPTIONS]
  --engine_dir PATH               Path to a serialized TRT-LLM engine.
  --backend [pytorch|_autodeploy]
                                  Set to 'pytorch' for pytorch path.
  --dataset PATH  --num_requests INTEGER  --warmup INTEGER  --concurrency INTEGER
  --streaming     --report_json FILE
"""
HELP_1_0 = HELP.replace("[pytorch|_autodeploy]", "[pytorch|_autodeploy|tensorrt]")
# Answers as bench/dataclasses/reporting.py lays its report out.
TRTLLM_BENCH = f"""
import json, os, pathlib, sys
mode = os.environ.get("FAKE_TRTLLM_BENCH", "")
if "--help" in sys.argv:
    print({HELP!r})
    sys.exit(3 if mode == "no help" else 0)
flags = {{word: sys.argv[place + 1] for place, word in enumerate(sys.argv[:-1])}}
lines = [json.loads(line) for line in open(flags["--dataset"])]
assert (pathlib.Path(flags["--engine_dir"]) / "config.json").exists()
assert len(lines) == int(flags["--num_requests"])
report = pathlib.Path(flags["--report_json"])
for number in range(30):
    print("line", number, flush=True)
if mode == "fail":
    sys.exit("RuntimeError: CUDA out of memory")
percentiles = {{"p50": 80.0, "p99": 120.0, "average": 90.0}}
found = {{
    "engine": {{"backend": "Pytorch" if mode == "pytorch" else "TRT"}},
    "request_info": {{"num_requests": len(lines) - (mode == "lost")}},
    "performance": {{"system_output_throughput_tok_s": 100.0 * len(lines)}},
    "streaming_metrics": {{
        "avg_ttft_ms": 90.0, "avg_tpot_ms": 12.5, "ttft_percentiles": percentiles,
    }},
}}
if mode == "other report":
    del found["streaming_metrics"]
if mode == "garbage":
    report.write_text("{{")
elif mode != "no report":
    report.write_text(json.dumps(found))
"""


def floors(*, tp_size: int = 1, gpu: str = "A100-80G") -> Floors:
    return Floors.checked(SPEC_8B, LLMBuild("bf16", tp_size), GPUS[gpu])


# --- floors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [1, 4])
def test_floors_are_those_of_the_plan(tp_size: int) -> None:
    report = make_plan("InternVL2_5-8B", gpu="A100-80G", tp_size=tp_size)
    planned = {row["part"]: row["floor_s"] for row in report["one request, no other"]}
    least = floors(tp_size=tp_size)
    prompt = 13 * 256 + 64
    assert least.vision_s(13, num_gpus=tp_size) == planned["vision, 13 tiles"]
    assert least.prefill_s(prompt) == planned[f"prefill, {prompt} tokens"]
    assert least.step_s(1, prompt + 64) == planned["every further token"]
    assert least.vision_s(0) == 0
    for row in report["load"]:
        most = least.output_tokens_per_s(
            batch_size=row["batch"], num_tiles=13, prompt_tokens=prompt, output_tokens=128
        )
        assert most == pytest.approx(row["ceiling_output_tokens_per_s"])


def test_which_gpu_the_floors_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    build = LLMBuild("bf16", 2)

    def found(gpu: str | None = None) -> tuple[str | None, str]:
        least, sentence = floors_of(SPEC_8B, build, profile="gpu", gpu=gpu)
        return least.gpu.name if least else None, sentence

    assert found()[0] is None
    assert "no GPU here; name it: --gpu A100-40G" in found()[1]
    assert found("h100") == ("H100-80G", f"Floors: H100-80G, from its {GPUS['H100-80G'].source}.")
    with pytest.raises(BuildFailed, match="GPU='V100' is unknown; use one of A100"):
        found("V100")
    write_program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    assert found()[0] == "A100-80G"
    write_program(tmp_path, "nvidia-smi", NVIDIA_SMI.replace("A100-SXM4-80GB", "Quadro 1"))
    assert found()[0] is None
    assert "the planner does not know NVIDIA Quadro 1" in found()[1]
    assert floors_of(SPEC_8B, build, profile="cpu", gpu="H100")[0] is None
    with pytest.raises(BuildFailed, match="fp8 needs compute capability"):
        floors_of(SPEC_8B, LLMBuild("fp8", 1), profile="gpu", gpu="A100")


# --- vision ---------------------------------------------------------------------------------------


def test_numbers_of_tiles() -> None:
    assert tile_counts(None, most=26) == [1, 2, 4, 7, 13, 26]
    assert tile_counts(None, most=13) == [1, 2, 4, 7, 13]
    assert tile_counts(None, most=3) == [1, 2, 3]
    assert tile_counts([5, 1, 5], most=5) == [1, 5]
    with pytest.raises(InvalidRequest, match="has 6; the engine runs 1 to 5 tiles"):
        tile_counts([6], most=5)


class FakeEngine:
    """A GPU whose clock is its queue: run k of n tiles takes n + k / 10 ms, a copy 100 ms."""

    device, stream, tile_size, max_tiles = "cuda:0", "stream", 28, 4

    def __init__(self) -> None:
        self.clock_ms, self.runs, self.uploads = 0.0, 0, 0

    def upload(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert tiles.dtype == np.uint8
        assert tiles.shape[1:] == (28, 28, 3)
        self.uploads += 1
        self.clock_ms += 100
        return tiles

    def run(self, batch: NDArray[np.uint8]) -> None:
        self.runs += 1
        self.clock_ms += len(batch) + self.runs / 10

    def start(self, tiles: NDArray[np.uint8]) -> None:
        self.run(self.upload(tiles))

    def wait(self) -> None: ...


def test_the_gpus_clock_sees_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "stream"
            self.at_ms = engine.clock_ms

        def elapsed_time(self, later: Event) -> float:
            return later.at_ms - self.at_ms

    cuda = SimpleNamespace(device=lambda _: contextlib.nullcontext(), Event=Event)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    first, second = time_cuda_engine(engine, [1, 4], rounds=5, warm_up=2)  # type: ignore[arg-type]
    # Runs 1 to 7 are whole calls, 8 and 9 the warm-up, 10 to 14 are timed: 2.0, 2.1, ... 2.4.
    assert first.num_tiles == 1
    assert first.median_ms == pytest.approx(2.2)
    assert first.p90_ms == pytest.approx(2.36)
    assert second.median_ms == pytest.approx(4 + 2.6)
    assert (engine.runs, engine.uploads) == (2 * (2 * 7), 2 * (7 + 1))
    assert first.call_ms is not None


def test_table_of_the_vision_engine() -> None:
    times = [VisionTime(1, 4.0, 5.0, 6.0), VisionTime(13, 60.0, 61.0, 62.5)]
    head, one, many = vision_rows(times, floors())
    assert head == ["tiles", "ms", "p90", "ms per tile", "with copy and wait", "floor", "/ floor"]
    least_ms = 1000 * floors().vision_s(13)
    assert many[:5] == ["13", "60.00", "61.00", "4.62", "62.50"]
    assert many[5:] == [f"{least_ms:.2f}", f"{60 / least_ms:.2f}"]
    assert one[0] == "1"
    assert vision_rows([VisionTime(2, 3.0, 4.0)], None) == [
        ["tiles", "ms", "p90", "ms per tile"],
        ["2", "3.00", "4.00", "1.50"],
    ]


def test_the_cpu_profile_times_onnx_runtime(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(checkpoints["qwen2"]), "--artifacts", str(tmp_path)]
    options += ["--profile", "cpu", "--rounds", "2", "--warm-up", "1", "--tiles", "2,1"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "No floors: the engines run on a CPU" in printed
    assert "/ floor" not in printed
    assert "Language model: not timed in the cpu profile" in printed
    (file,) = (tmp_path / "benchmarks" / "engine_only").glob("qwen2-tp1-*/results.json")
    results = json.loads(file.read_text())
    assert [row["num_tiles"] for row in results["vision"]] == [1, 2]
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in results["vision"])
    assert (results["build"], results["profile"]) == ("bf16-tp1", "cpu")


def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--profile", "tpu"], "PROFILE='tpu' is unknown"),
        (["--profile", "cpu", "--tiles", "1;2"], "--tiles is '1;2'; give numbers with commas"),
        (["--profile", "cpu", "--model", "no-such"], "is neither a directory nor a known name"),
    ):
        assert main(options) == 1
        assert message in capsys.readouterr().err


def test_on_a_gpu_host_it_runs_in_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("nvidia-smi", NVIDIA_SMI), ("docker", DOCKER)):
        write_program(tmp_path / "bin", name, code)
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        "PATH": str(tmp_path / "bin"),
        "PYTHONPATH": "",
        "FAKE_DOCKER_CALLS": str(calls),
    }
    options = ["--model=demo", "--tp-size=2", "--llm-tiles=1,7", "--gpu=H100", "--part=llm"]
    options += [f"--artifacts={tmp_path / 'artifacts'}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine_only", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "in the container"), done.stderr
    command = json.loads(calls.read_text().splitlines()[-1])
    inside = command[command.index("benchmarks.engine_only") :]
    assert {*options, "--profile=gpu", "--waves=4", "--rounds=50"} <= set(inside)
    assert not any("None" in word for word in inside)


# --- language model -------------------------------------------------------------------------------


def cases(tiles: list[int] | None, at_a_time: list[int] | None, **limits: int) -> list[Case]:
    built_for = Limits.for_model(SPEC_8B, **{"max_batch_size": 8, **limits})
    return llm_cases(
        tiles, at_a_time, tokens_per_tile=256, output_tokens=128, waves=4, limits=built_for
    )


def test_cases() -> None:
    found = cases([0, 13], [1, 8])
    assert [(c.command, c.num_tiles, c.concurrency, c.requests) for c in found] == [
        *[("latency", 0, 1, 8), ("throughput", 0, 1, 8), ("throughput", 0, 8, 32)],
        *[("latency", 13, 1, 8), ("throughput", 13, 1, 8), ("throughput", 13, 8, 32)],
    ]
    assert found[0].prompt_tokens == 64
    assert found[-1].prompt_tokens == 13 * 256 + 64
    small = cases(None, None, max_batch_size=1, max_seq_len=2048)
    assert {(case.num_tiles, case.concurrency) for case in small} == {(1, 1)}
    with pytest.raises(InvalidRequest, match="--at-a-time has 9; the engine was built for 1 to 8"):
        cases([1], [9])
    with pytest.raises(InvalidRequest, match=r"--llm-tiles has 13: 3392 \+ 128 tokens, and the"):
        cases([13], [1], max_seq_len=2048)


def test_requests_are_random_ids_of_the_vocabulary() -> None:
    case = Case("latency", 0, 40, 7, concurrency=1, requests=50)
    lines = [json.loads(line) for line in trtllm_bench.request_lines(case, vocab_size=1283)]
    assert [line["task_id"] for line in lines] == list(range(50))
    assert all(set(line) == {"task_id", "input_ids", "output_tokens"} for line in lines)
    ids = np.array([line["input_ids"] for line in lines])
    assert ids.shape == (50, 40)
    assert 0 <= ids.min() < 10
    assert 1270 < ids.max() < 1283  # ids from vocab_size on select rows of the prompt table
    assert len({tuple(row) for row in ids}) == 50
    assert {line["output_tokens"] for line in lines} == {7}


def test_the_command_line() -> None:
    words = trtllm_bench.command_line(
        "trtllm-bench",
        CASE,
        model="InternVL2_5-8B",
        stand_in=Path("/w/stand-in"),
        engine=Path("/e"),
        dataset=Path("/w/d.jsonl"),
        report=Path("/w/r.json"),
    )
    assert " ".join(words) == (
        "trtllm-bench --model InternVL2_5-8B --model_path /w/stand-in --workspace /w throughput"
        " --engine_dir /e --dataset /w/d.jsonl --num_requests 32 --warmup 2 --concurrency 8"
        " --report_json /w/r.json --streaming"
    )


def test_every_release_runs_the_engine() -> None:
    assert trtllm_bench.engine_options(CASE, HELP) == []
    assert trtllm_bench.engine_options(CASE, HELP_1_0) == ["--backend", "tensorrt"]
    cpp = HELP.replace("_autodeploy]", "autodeploy|cpp]")
    assert trtllm_bench.engine_options(CASE, cpp) == ["--backend", "cpp"]
    without = HELP.replace("--report_json FILE", "").replace("--streaming", "")
    latency = Case("latency", 1, 320, 128, concurrency=1, requests=8)
    with pytest.raises(BuildFailed, match=r"`trtllm-bench latency` of this .* no --report_json;"):
        trtllm_bench.engine_options(latency, without)
    with pytest.raises(BuildFailed, match="has no --report_json, --streaming; it is used as in"):
        trtllm_bench.engine_options(CASE, without)


def test_transformers_reads_the_stand_in(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="see `make test-env`")
    from safetensors import safe_open

    folder = trtllm_bench.write_stand_in(tmp_path / "a", SPEC_8B.llm, dtype="bfloat16")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 32, 4096)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, padding_side="left", trust_remote_code=True
    )
    assert tokenizer.pad_token_id == 0
    with safe_open(folder / "model.safetensors", framework="np") as opened:
        (name,) = opened.keys()
        assert opened.get_tensor(name).shape == (1,)


@dataclass
class Bench:
    built: MeasuredBuild
    folder: Path

    def run(self) -> list[LlmTime]:
        latency = Case("latency", 1, 20, 4, concurrency=1, requests=3)
        throughput = Case("throughput", 1, 20, 4, concurrency=2, requests=4)
        return run_llm(self.built, [latency, throughput], self.folder)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A build, of which there is what is read, and a stand-in for trtllm-bench."""
    artifacts, llm = Artifacts(tmp_path / "tiny"), LLMBuild("bf16", 2)
    config = json.dumps(tiny_config("internlm2", "300m"))
    engine = json.dumps({"pretrained_config": {"dtype": "bfloat16"}})
    for folder, text in ((artifacts.tokenizer_dir, config), (artifacts.llm_engine(llm), engine)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    write_program(tmp_path / "bin", trtllm_bench.PROGRAM, TRTLLM_BENCH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    return Bench(MeasuredBuild(artifacts, llm, "gpu"), tmp_path / "out")


def test_its_report_becomes_times(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    latency, throughput = bench.run()
    assert latency == LlmTime(90.0, 120.0, 12.5, 300.0)
    assert throughput.output_tokens_per_s == 400.0
    assert "[2/2] trtllm-bench throughput-1-tiles-2-at-a-time" in capfd.readouterr().out
    logs = sorted(file.name for file in bench.folder.glob("*.log"))
    assert logs == ["latency-1-tiles-1-at-a-time.log", "throughput-1-tiles-2-at-a-time.log"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "fail",
            r"(?s)trtllm-bench failed with exit code 1; the end of .*line 29\nRuntimeError: C",
        ),
        ("no help", r"(?s)`trtllm-bench latency --help` ended with exit code 3; its last.*Usage"),
        ("no report", "ended well, but wrote no report"),
        ("garbage", "is no JSON"),
        ("other report", r"as of TensorRT-LLM 0.21: streaming_metrics.avg_ttft_ms is None"),
        ("pytorch", "ran its backend 'Pytorch' instead of the engine"),
        ("lost", "2 of 3 requests were answered; the log beside"),
    ],
)
def test_what_it_does_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_TRTLLM_BENCH", mode)
    with pytest.raises(BuildFailed, match=message) as told:
        bench.run()
    assert "line 3\n" not in str(told.value)  # the end of the log only


def test_table_of_the_language_model() -> None:
    time = LlmTime(ttft_ms=400.0, ttft_p99_ms=500.0, tpot_ms=20.0, output_tokens_per_s=250.0)
    least = llm_floors(CASE, floors())
    assert least["ttft_ms"] == 1000 * floors().prefill_s(3392)
    assert least["tpot_ms"] == 1000 * floors().step_s(8, 3456)
    head, row = llm_rows([CASE], [time], floors())
    cells = dict(zip(head[3:], row[3:], strict=True))
    assert row[0] == "13 tiles: 3392 + 128 tokens, 8 at a time"
    assert row[1:4] == ["400.00", f"{least['ttft_ms']:.2f}", f"{400 / least['ttft_ms']:.2f}"]
    assert row[4:7] == ["20.00", f"{least['tpot_ms']:.2f}", f"{20 / least['tpot_ms']:.2f}"]
    assert cells["of it"] == f"{250 / least['output_tokens_per_s']:.0%}"
    latency: dict[str, Any] = {"concurrency": 1, "requests": 8}
    _, row = llm_rows([Case("latency", 1, 320, 128, **latency)], [time], None)
    assert row == ["1 tile: 320 + 128 tokens, latency", "400.00", "20.00", "250"]
