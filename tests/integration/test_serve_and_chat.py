"""The commands behind `make engines`, `make serve`, `make chat` and `make demo`, as programs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from build.engines import build_engines
from internvl_triton.client import Client
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.triton_server import find_free_port
from tests.integration.conftest import tiny_service_config
from tests.integration.pictures import encoded, picture
from tests.integration.processes import eventually, processes_naming, shared_memory_of

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[2]
STOP_WITHIN_S = 20.0  # Triton's exit timeout of 10 s, and a loaded machine
STEPS = ("tokenizer", "vision", "llm bf16-tp1", "repository")


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=180
    )


@dataclass(frozen=True)
class Built:
    """A checkpoint and the folder of its artefacts."""

    checkpoint: Path
    artifacts: Path

    @property
    def root(self) -> Path:
        return self.artifacts / self.checkpoint.name

    @property
    def arguments(self) -> tuple[str, ...]:
        return (f"--model={self.checkpoint}", f"--artifacts={self.artifacts}", "--profile=cpu")


@pytest.fixture
def unbuilt(tmp_path: Path) -> Built:
    checkpoint = write_random_checkpoint(tmp_path / "tiny", tiny_service_config("qwen2"))
    return Built(checkpoint, tmp_path / "artifacts")


@pytest.fixture
def built(unbuilt: Built) -> Built:
    build_engines(str(unbuilt.checkpoint), artifacts_dir=unbuilt.artifacts, progress=False)
    return unbuilt


# --- serve and chat -----------------------------------------------------------------------------


@contextmanager
def serving(built: Built, ports: dict[str, int]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`build.serve` as a process of its own, ready, and what it printed until then."""
    options = [f"--{name}-port={port}" for name, port in ports.items()]
    process = subprocess.Popen(
        command("build.serve", *built.arguments, *options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            printed = ""
            for line in process.stdout:
                printed += line
                if "Ctrl-C" in line:
                    break
            yield process, printed
        finally:
            process.kill()


def test_serve_and_chat(built: Built, tmp_path: Path) -> None:
    ports = {name: find_free_port() for name in ("http", "grpc", "metrics")}
    url = f"127.0.0.1:{ports['grpc']}"
    image = tmp_path / "picture.png"
    image.write_bytes(encoded(picture(300, 300)))
    with serving(built, ports) as (process, printed):
        assert f"gRPC     {url}" in printed, printed
        assert f"http://127.0.0.1:{ports['http']}/v2/models/internvl/generate" in printed
        assert f"http://127.0.0.1:{ports['metrics']}/metrics" in printed

        asked = ("--prompt=What is a triangle?", f"--grpc-port={ports['grpc']}", "--max-tokens=8")
        chat = run("clients.chat", *asked, f"--model={built.checkpoint}", f"--image={image}")
        assert chat.returncode == 0, chat.stderr
        with Client(url) as client:
            expected = client.generate(
                "What is a triangle?", images=[image.read_bytes()], max_tokens=8
            )
        assert chat.stdout.strip() == expected.text
        tokens = f"{expected.num_input_tokens} + 8 tokens, TTFT "
        assert re.search(rf"^\[{re.escape(tokens)}.*, finish_reason length\]$", chat.stderr, re.M)
        assert "Traceback" not in chat.stderr

        other = run("clients.chat", *asked, "--model=InternVL2_5-8B")
        assert other.returncode == 1
        assert f"port {ports['grpc']} serves tiny, not InternVL2_5-8B" in other.stderr

        second = run("build.serve", *built.arguments, f"--grpc-port={ports['grpc']}")
        assert second.returncode == 1
        (sentence,) = second.stderr.splitlines()
        assert re.match(r"error: \w+ port \d+ on 127.0.0.1 is in use by another program", sentence)

        repository = built.root / "repository"
        assert len(processes_naming(repository)) >= 1
        assert shared_memory_of(process.pid)
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert time.monotonic() - interrupted < STOP_WITHIN_S
        assert process.stdout is not None
        assert "stopped" in process.stdout.read()
    assert eventually(lambda: processes_naming(repository) == [])
    assert shared_memory_of(process.pid) == []

    gone = run("clients.chat", *asked)
    assert gone.returncode == 1
    assert f"error: the server at {url} cannot be reached" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_serving_what_was_not_built_names_the_command(unbuilt: Built) -> None:
    done = run("build.serve", *unbuilt.arguments)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert "make engines MODEL=" in sentence
    assert not unbuilt.artifacts.exists()


def test_demo(tmp_path: Path) -> None:
    done = run("clients.demo", f"--artifacts={tmp_path / 'artifacts'}")
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"^PASS: (\d+) of (\d+) answers are right\.$", done.stdout, re.MULTILINE)
    assert said, done.stdout
    assert said[1] == said[2]
    shown = re.findall(r"^\[right; \d+ tiles?, \d+ \+ \d+ tokens, TTFT \d+ ms", done.stdout, re.M)
    assert len(shown) == int(said[2]), done.stdout
    assert eventually(lambda: processes_naming(tmp_path) == [])


# --- engines ------------------------------------------------------------------------------------

# Stops for good when the language model's third tensor is read, and says so.
STUCK_BUILD = """\
import sys, time
from build.engines import main
from internvl_triton.checkpoint import Checkpoint

read, seen = Checkpoint.read, []

def read_slowly(self, name, *arguments, **options):
    if name.startswith("language_model."):
        seen.append(name)
        if len(seen) == 3:
            print("stuck", flush=True)
            time.sleep(600)
    return read(self, name, *arguments, **options)

Checkpoint.read = read_slowly
sys.exit(main(sys.argv[1:]))
"""


def build(built: Built, *options: str) -> dict[str, str]:
    """Step -> "up to date" or "done", as `build.engines` prints them."""
    done = run("build.engines", *built.arguments, *options)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^\[\d/\d\] (.+?): (up to date|done)", done.stdout, re.MULTILINE)
    assert f"make serve MODEL={built.checkpoint}" in done.stdout
    return dict(told)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_killed_build_is_completed_by_the_next_one(unbuilt: Built) -> None:
    stuck = subprocess.Popen(
        [sys.executable, "-c", STUCK_BUILD, *unbuilt.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with stuck:
        assert stuck.stdout is not None
        assert any(line == "stuck\n" for line in stuck.stdout)
        other = run("build.engines", *unbuilt.arguments)
        assert other.returncode == 1
        assert "another build of tiny is running" in other.stderr
        stuck.kill()

    checkpoint = unbuilt.root / "llm" / "bf16-tp1" / "checkpoint"
    assert not checkpoint.exists()
    manifest = json.loads((unbuilt.root / "manifest.json").read_text())
    assert set(manifest["steps"]) == {"tokenizer", "vision"}
    serve = run("build.serve", *unbuilt.arguments)
    assert serve.returncode == 1
    assert "no finished step 'llm bf16-tp1'" in serve.stderr

    told = build(unbuilt)
    assert told == dict(zip(STEPS, ("up to date", "up to date", "done", "done"), strict=True))
    assert [path for path in unbuilt.root.rglob("*") if path.name.endswith((".tmp", ".old"))] == []

    whole = Built(unbuilt.checkpoint, unbuilt.artifacts.with_name("whole"))
    build_engines(str(whole.checkpoint), artifacts_dir=whole.artifacts, progress=False)
    assert files_of(checkpoint) == files_of(whole.root / "llm" / "bf16-tp1" / "checkpoint")


def test_a_build_does_what_is_out_of_date(built: Built) -> None:
    assert build(built) == dict.fromkeys(STEPS, "up to date")
    two_ranks = build(built, "--tp-size=2")
    assert two_ranks == {
        "tokenizer": "up to date",
        "vision": "up to date",
        "llm bf16-tp2": "done",
        "repository": "done",
    }
    assert (built.root / "llm" / "bf16-tp1" / "checkpoint" / "rank0.safetensors").is_file()

    before = (built.root / "llm" / "bf16-tp2" / "checkpoint" / "rank0.safetensors").read_bytes()
    write_random_checkpoint(built.checkpoint, tiny_service_config("qwen2"), seed=1)
    assert set(build(built, "--tp-size=2").values()) == {"done"}
    after = (built.root / "llm" / "bf16-tp2" / "checkpoint" / "rank0.safetensors").read_bytes()
    assert not np.array_equal(np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8))
    # The other conversion is of the old weights now, and is not served with the new ones.
    stale = run("build.serve", *built.arguments, "--tp-size=1")
    assert stale.returncode == 1
    assert "'llm bf16-tp1'" in stale.stderr
    assert "was made from another checkpoint" in stale.stderr
