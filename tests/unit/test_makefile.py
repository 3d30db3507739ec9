"""`make help`, the targets and the README agree; values reach the programs as they were given."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def targets() -> set[str]:
    """Every target that is a command, so not a file of the environment."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    found = [re.match(r"([a-z][a-z-]*):(?!=)", line) for line in lines]
    return {match[1] for match in found if match}


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Not what a surrounding `make test MODEL=...` passes down.
    passed_down = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MODEL", "TP", "PROFILE", "PRECISION"}
    environment = {name: value for name, value in os.environ.items() if name not in passed_down}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_help_is_the_default_and_lists_every_target() -> None:
    printed = make()
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == make("help").stdout
    listed = re.findall(r"^  make ([a-z-]+) +\S", printed.stdout, re.MULTILINE)
    assert set(listed) == targets()
    assert {"demo", "engines", "serve", "chat", "check-engines", "test"} <= targets()


def test_every_target_is_phony() -> None:
    phony = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert phony == targets()  # build/ and export/ are folders: make must not look at files


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README yet")
def test_readme_names_only_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", readme, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets()


def test_every_module_in_a_recipe_exists() -> None:
    modules = set(re.findall(r"-m ((?:\w+\.)+\w+)", (ROOT / "Makefile").read_text()))
    missing = [name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).exists()]
    assert missing == []


@pytest.fixture
def project_with_fake_python(tmp_path: Path) -> Path:
    """The Makefile with an environment that is up to date and whose `python` prints arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    for lock in ("runtime.lock", "gateway.lock", "test.lock", "torch.lock"):
        (tmp_path / "requirements" / lock).touch()
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"#!{sys.executable} -I\nimport sys\nprint('\\n'.join(sys.argv[1:]))\n")
    fake.chmod(0o755)
    for stamp in ("created", "runtime", "gateway", "test"):
        (tmp_path / ".venv" / f"{stamp}.stamp").touch()
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "What is this?",
        "it's a \"cat\" or a 'dog'; `ls` & more",
        "costs $5, $(HOME) or $$HOME",
        "a=b # c % d \\ e",
        "--help",
        "第一",
    ],
)
def test_chat_passes_texts_on_unchanged(project_with_fake_python: Path, text: str) -> None:
    said = make("chat", f"PROMPT={text}", f"IMAGE=a {text}.jpg", folder=project_with_fake_python)
    assert said.stdout.splitlines() == [
        "-m",
        "clients.chat",
        "--model=demo",
        f"--prompt={text}",
        f"--image=a {text}.jpg",
    ], said.stderr


def test_empty_variables_give_no_options(project_with_fake_python: Path) -> None:
    assert make("engines", "MODEL=/my models/x", folder=project_with_fake_python).stdout.split(
        "\n"
    ) == ["-m", "build.engines", "--model=/my models/x", "--tp-size=1", ""]
    served = make("serve", "TP=2", "PROFILE=cpu", "HTTP_PORT=80", folder=project_with_fake_python)
    expected = ["build.serve", "--model=demo", "--tp-size=2", "--profile=cpu", "--http-port=80"]
    assert served.stdout.splitlines() == ["-m", *expected]
    assert make("gateway", folder=project_with_fake_python).stdout.split() == [
        "-m",
        "gateway.serve",
    ]
    ports = ("GRPC_PORT=81", "GATEWAY_PORT=90", "API_KEYS=my keys")
    started = make("gateway", *ports, folder=project_with_fake_python)
    expected = ["gateway.serve", "--grpc-port=81", "--port=90", "--api-keys=my keys"]
    assert started.stdout.splitlines() == ["-m", *expected]


def test_unsupported_python_is_refused_with_a_sentence(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "runtime.lock").touch()
    refused = make("env", "PYTHON=no-such-python", folder=tmp_path)
    assert refused.returncode != 0
    assert "Python 3.10, 3.11 or 3.12 is needed, and no-such-python is not one" in refused.stderr
    assert not (tmp_path / ".venv").exists()
