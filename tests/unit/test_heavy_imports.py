"""Every module imports, and every program prints its --help, without the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM_FOLDERS = ("benchmarks", "build", "clients", "demo", "export", "gateway")

WITHOUT_HEAVY_LIBRARIES = """
import importlib, runpy, sys
HEAVY = {
    "onnx", "onnxruntime", "tensorrt", "tensorrt_llm", "tensorrt_rtx", "torch", "transformers",
    "tritonclient",
}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ImportError(f"{name} is imported at module level: import it where it is used")
sys.meta_path.insert(0, Refuse())
"""
# What a folder's modules import because they are about it; its programs do without for --help.
OWN_LIBRARIES = """
HEAVY |= {"httptools", "openai", "prometheus_client", "pybase64", "starlette", "uvicorn", "uvloop"}
"""
IMPORT_ALL = "failed = {}\nfor name in sys.argv[1:]:\n" + (
    "    try:\n"
    "        importlib.import_module(name)\n"
    "    except Exception as error:\n"
    "        failed[name] = f'{type(error).__name__}: {error}'\n"
    "for name, why in failed.items():\n"
    "    print(f'{name}: {why}')\n"
    "sys.exit(bool(failed))\n"
)
RUN_PROGRAM = "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"


def modules(folder: str) -> list[str]:
    """Dotted names of all modules in a top-level folder."""
    names = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def programs() -> list[str]:
    found = []
    for folder in PROGRAM_FOLDERS:
        for name in modules(folder):
            file = ROOT / (name.replace(".", "/") + ".py")
            if file.exists() and 'if __name__ == "__main__":' in file.read_text():
                found.append(name)
    return found


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_HEAVY_LIBRARIES + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_module_imports() -> None:
    names = [name for folder in ("internvl_triton", *PROGRAM_FOLDERS) for name in modules(folder)]
    result = run_python(IMPORT_ALL, *names)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("program", programs())
def test_every_program_prints_its_help(program: str) -> None:
    result = run_python(OWN_LIBRARIES + RUN_PROGRAM, program, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_the_libraries_are_really_refused() -> None:
    result = run_python("import torch\n")
    assert result.returncode != 0
    assert "torch is imported at module level" in result.stderr
