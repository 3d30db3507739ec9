"""Where the shared library of this Python is, which Triton's Python models run in."""

import subprocess
import sys
import sysconfig
from pathlib import Path

LIBPYTHON = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
# `python -m build.libpython` puts it here on a machine that has none.
LIBPYTHON_FOLDER = Path(sys.prefix) / "lib" / "libpython"


def find_libpython() -> Path | None:
    """The path of `LIBPYTHON`, or None when this machine has none."""
    folders = [
        LIBPYTHON_FOLDER,
        Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"),
        Path(sys.base_prefix) / "lib",
        Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"),
    ]
    for folder in folders:
        if (folder / LIBPYTHON).is_file():
            return folder / LIBPYTHON
    return _known_to_the_linker()


def _known_to_the_linker() -> Path | None:
    """Look `LIBPYTHON` up in the dynamic linker's cache."""
    for program in ("ldconfig", "/sbin/ldconfig"):  # /sbin is not on every user's PATH
        try:
            listing = subprocess.run([program, "-p"], capture_output=True, text=True).stdout
        except OSError:
            continue
        for line in listing.splitlines():  # libfoo.so.1 (libc6,x86-64) => /lib/libfoo.so.1
            name, _, path = line.strip().partition(" => ")
            if name.split(" ")[0] == LIBPYTHON and Path(path).is_file():
                return Path(path)
    return None
