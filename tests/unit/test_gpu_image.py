"""The container image of the gpu profile: where it starts, what goes in, what it installs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from build import pin

ROOT = Path(__file__).parents[2]
RUNS_IN_THE_IMAGE = ("internvl_triton", "export", "build")
PACKAGE_OF = {"PIL": "pillow", "google": "tritonclient", "grpc": "tritonclient"}
# The last three are requirements of TensorRT-LLM 0.21 itself.
IN_THE_CONTAINER = {"tensorrt", "torch", "accelerate", "modelopt", "transformers"}
CPU_PROFILE_ONLY = {"onnxruntime"}
TESTS_ONLY = {"tensorrt_rtx"}


def test_it_starts_from_the_pin_which_stands_in_one_file() -> None:
    lines = (ROOT / "build" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == [f"FROM {pin.IMAGE}"]
    sources = [*ROOT.glob("build/*"), *ROOT.glob("internvl_triton/**/*.py"), ROOT / "Makefile"]
    named = {path.name for path in sources if path.is_file() and pin.IMAGE in path.read_text()}
    assert named == {"pin.py", "Dockerfile"}


def test_it_gets_the_project_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    wanted = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in wanted)
    assert {*RUNS_IN_THE_IMAGE, "demo", "model_repository"} <= wanted
    assert not wanted & {"artifacts", ".venv", ".git"}


def installed(extra: str) -> set[str]:
    """Names of the packages of an extra, or of the base dependencies, in pyproject.toml."""
    block = re.search(
        rf"^{extra} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert block, extra
    names = re.findall(r'^    "([A-Za-z0-9_.-]+)', block[1], re.MULTILINE)
    return {name.lower().replace("-", "_") for name in names}


def imported() -> Iterator[str]:
    for folder in RUNS_IN_THE_IMAGE:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.split(".")[0]


def test_it_installs_what_is_imported_and_leaves_the_containers_packages_alone() -> None:
    extra = installed("gpu")
    have = extra | installed("dependencies") | IN_THE_CONTAINER
    own = {*RUNS_IN_THE_IMAGE, "demo", "pytriton"}
    foreign = set(imported()) - sys.stdlib_module_names - own
    needed = {PACKAGE_OF.get(name, name) for name in foreign} - CPU_PROFILE_ONLY - TESTS_ONLY
    assert needed <= have, sorted(needed - have)
    assert not extra & {"torch", "tensorrt", "tensorrt_llm", "nvidia_pytriton", "onnxruntime"}
    dockerfile = (ROOT / "build" / "Dockerfile").read_text()
    assert "--constraint /tmp/container.txt" in dockerfile
    assert '".[gpu]"' in dockerfile
