"""Writes requirements/*.lock: exact versions of everything `pyproject.toml` asks for.

Each file serves Python 3.10, 3.11 and 3.12. torch is the only line of a file of its own, because
it is installed on its own (`build/install_torch.py`). Needs `uv`, which `make lock` installs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path("requirements")
RUNTIME_EXTRAS = ["client", "cpu"]
GATEWAY_EXTRAS = [*RUNTIME_EXTRAS, "gateway"]
BENCH_EXTRAS = [*GATEWAY_EXTRAS, "bench"]
TEST_EXTRAS = [*BENCH_EXTRAS, "test"]
# True wherever the locks are used (`environments` in pyproject.toml), so they say nothing.
ALWAYS_TRUE = {
    "python_full_version < '3.13'",
    "implementation_name == 'cpython'",
    "platform_python_implementation == 'CPython'",
    "platform_machine == 'x86_64'",
    "sys_platform == 'linux'",
}


def without_constant_markers(line: str) -> str:
    """`a==1 ; x and sys_platform == 'linux'` -> `a==1 ; x`. Markers with brackets stay whole."""
    requirement, _, marker = line.partition(" ; ")
    if "(" in marker:
        return line
    kept = [clause for clause in marker.split(" and ") if clause and clause not in ALWAYS_TRUE]
    return f"{requirement} ; {' and '.join(kept)}" if kept else requirement


def resolve(extras: list[str], *, current: Path, agree_with: Path | None = None) -> list[str]:
    """One `name==version` line per package. Versions that the file `current` holds are kept.

    Raises:
        subprocess.CalledProcessError: uv found no solution, or no network. It has said why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal"]
    command += ["--python-version", "3.10", "--group", "install"]
    command += ["--no-annotate", "--no-header", "--quiet"]
    for extra in extras:
        command += ["--extra", extra]
    if agree_with:
        command += ["--constraint", str(agree_with)]
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        output = Path(folder) / "lock.txt"
        if current.exists():
            output.write_text(current.read_text())
        subprocess.run([*command, "--output-file", str(output)], check=True)
        return [without_constant_markers(line) for line in output.read_text().splitlines()]


def write(path: Path, lines: list[str]) -> None:
    """Write one lock file, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("\n".join(["# Written by `make lock` from pyproject.toml.", *lines, ""]))
    unfinished.replace(path)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    if parser.parse_args(argv).upgrade:
        for lock in FOLDER.glob("*.lock"):
            lock.unlink()
    FOLDER.mkdir(exist_ok=True)
    runtime, gateway, bench, test = (
        FOLDER / f"{name}.lock" for name in ("runtime", "gateway", "bench", "test")
    )
    try:
        write(runtime, resolve(RUNTIME_EXTRAS, current=runtime))
        write(gateway, resolve(GATEWAY_EXTRAS, current=gateway, agree_with=runtime))
        write(bench, resolve(BENCH_EXTRAS, current=bench, agree_with=gateway))
        everything = resolve(TEST_EXTRAS, current=test, agree_with=bench)
    except subprocess.CalledProcessError as error:
        print("The lock files could not be written: uv says why above.", file=sys.stderr)
        return error.returncode
    torch = [line for line in everything if line.startswith("torch==")]
    write(FOLDER / "torch.lock", torch)
    write(test, [line for line in everything if line not in torch])
    return 0


if __name__ == "__main__":
    sys.exit(main())
