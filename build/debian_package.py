"""Takes files out of a Debian or Ubuntu package without installing it, so without root."""

import shutil
import subprocess
import tempfile
from pathlib import Path


class PackageUnavailable(Exception):
    """The package could not be fetched. The message is one sentence without a remedy."""


def unpack_package(package: str, into: Path) -> None:
    """Fetch `package` from the machine's own package sources and unpack it into the folder `into`.

    Raises:
        PackageUnavailable: no apt on this machine, unknown package, or no network.
    """
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise PackageUnavailable(f"this machine has no {program} to fetch {package} with")
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        fetched = subprocess.run(
            ["apt-get", "download", package], cwd=folder, capture_output=True, text=True
        )
        files = list(Path(folder).glob("*.deb"))
        if fetched.returncode != 0 or not files:
            lines = fetched.stderr.strip().splitlines() or ["no file came"]
            raise PackageUnavailable(f"apt-get download {package}: {lines[-1]}")
        into.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", str(files[0]), str(into)], check=True)
