"""Makes sure that the shared library of Python is there, which Triton's Python models run in.

Debian and Ubuntu keep it in a package that python3 does not bring along. Where it is missing it is
taken from that package into the virtual environment: nothing is installed on the machine.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from build import debian_package
from internvl_triton.libpython import LIBPYTHON, LIBPYTHON_FOLDER, find_libpython

PACKAGE = f"libpython{sys.version_info[0]}.{sys.version_info[1]}"


def fetch() -> Path:
    """Put the library into `LIBPYTHON_FOLDER` and return its path.

    Raises:
        debian_package.PackageUnavailable: the package sources do not have it.
    """
    with tempfile.TemporaryDirectory(prefix="libpython-") as unpacked:
        debian_package.unpack_package(PACKAGE, Path(unpacked))
        library = next(Path(unpacked).rglob(LIBPYTHON), None)
        if library is None:
            raise debian_package.PackageUnavailable(f"the package {PACKAGE} has no {LIBPYTHON}")
        LIBPYTHON_FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = LIBPYTHON_FOLDER / f"{LIBPYTHON}.tmp"
        shutil.copyfile(library.resolve(), unfinished)
        return unfinished.replace(LIBPYTHON_FOLDER / LIBPYTHON)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    if find_libpython() is None:
        try:
            fetch()
        except debian_package.PackageUnavailable as error:
            print(
                f"Triton's Python models need {LIBPYTHON}, which this machine lacks, and {error}."
                f" Run: sudo apt-get update && sudo apt-get install {PACKAGE}",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
