"""What gets installed: one lock per purpose, nothing heavy where it is not needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def locked(name: str) -> dict[str, str]:
    """Package -> pinned version of one lock file."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    return dict(re.findall(r"^([a-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE | re.IGNORECASE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_locks_pin_versions_and_name_no_place(lock: Path) -> None:
    for line in lock.read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            assert re.match(r"[A-Za-z0-9_.\[\]-]+==", line), line
        assert "://" not in line, line
        assert "--index" not in line, line
        assert "--find-links" not in line, line


@pytest.mark.parametrize("name", ["runtime", "gateway", "bench", "test"])
def test_no_cuda_and_no_libraries_the_project_does_without(name: str) -> None:
    packages = {package.lower().replace("_", "-") for package in locked(name)}
    assert not packages & {"torchvision", "torchaudio", "timm", "decord", "flash-attn"}
    cuda = {package for package in packages if package.startswith(("nvidia-cu", "cuda-"))}
    assert not cuda


def test_the_demo_and_the_server_need_no_torch() -> None:
    runtime = locked("runtime")
    assert "torch" not in runtime
    assert "transformers" not in runtime
    assert runtime["numpy"].startswith("1.26")  # the stubs of Triton 2.51 cannot use numpy 2
    assert runtime["nvidia-pytriton"] == "0.7.0"


@pytest.mark.parametrize("name", ["runtime", "gateway", "bench"])
def test_every_package_of_a_lock_is_tested_with_that_version(name: str) -> None:
    test = locked("test")
    for package, version in locked(name).items():
        assert test[package] == version or package == "torch", package


def test_the_gateway_adds_little() -> None:
    assert locked("gateway").keys() - locked("runtime").keys() == {
        "httptools",
        "prometheus-client",
        "pybase64",
        "starlette",
        "uvicorn",
        "uvloop",
    }


def test_the_client_needs_only_numpy_pillow_and_tritonclient() -> None:
    program = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {"torch", "transformers", "onnxruntime", "onnx", "tokenizers", "sentencepiece",
                   "safetensors", "av", "huggingface_hub", "pytriton"}:
            raise ImportError(f"{name} is not part of the client")
sys.meta_path.insert(0, Finder())
from internvl_triton.client import Client
client = Client("127.0.0.1:9")
try:
    client.generate("Hi", timeout_s=20)
except Exception as error:
    print(type(error).__name__)
client.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.strip() == "ServerUnavailable", done.stderr
