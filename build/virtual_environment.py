"""Makes the virtual environment, with pip in it, on a machine that may lack python3-venv.

Runs on the machine's own Python before anything is installed: standard library only.
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from build import debian_package

PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def platform_problem() -> str | None:
    """Why this project cannot run here, as one sentence, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        here = f"{platform.system()} on {platform.machine()}"
        return f"this is {here}; the tritonserver we install runs on Linux on x86_64 only."
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return (
            f"{sys.executable} is Python {platform.python_version()}; Python 3.10, 3.11 or 3.12"
            " is needed: choose it with PYTHON=python3.11."
        )
    return None


def create(folder: Path) -> None:
    """Create the environment `folder`, replacing what is there.

    Raises:
        debian_package.PackageUnavailable: neither this Python nor the package sources have a pip.
    """
    has_pip = importlib.util.find_spec("ensurepip") is not None
    options = [] if has_pip else ["--without-pip"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, str(folder)], check=True)
    if not has_pip:  # Debian and Ubuntu keep ensurepip in python3-venv
        install_pip(folder)


def install_pip(environment: Path) -> None:
    """Install pip into `environment` from Debian's package of its wheel."""
    with tempfile.TemporaryDirectory(prefix="pip-") as unpacked:
        debian_package.unpack_package("python3-pip-whl", Path(unpacked))
        wheel = next(Path(unpacked).rglob("pip-*.whl"))
        subprocess.run(  # a wheel is a zip file that Python can import from
            [environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-index", wheel],
            env={**os.environ, "PYTHONPATH": str(wheel)},
            check=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to make it, such as .venv")
    arguments = parser.parse_args(argv)
    if problem := platform_problem():
        print(f"Cannot set up: {problem}", file=sys.stderr)
        return 1
    try:
        create(arguments.folder)
    except debian_package.PackageUnavailable as error:
        print(
            f"Cannot set up: {PYTHON} has no ensurepip, and {error}."
            f" Run: sudo apt-get update && sudo apt-get install {PYTHON}-venv lib{PYTHON}",
            file=sys.stderr,
        )
        return 1
    except subprocess.CalledProcessError as error:
        print(f"Cannot set up: this failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
