"""Installs torch, which only the comparisons with transformers need, as a CPU build.

The registry's Linux build of torch brings several GB of CUDA packages. So torch is installed on its
own, after a look at what pip would fetch. Where pip finds only that build, torch is left out and
the tests that need it are skipped with a reason; continuous integration (CI=true) refuses instead.
Standard library only.
"""

import argparse
import json
import os
import subprocess
import sys

LOCKED = ["--requirement", "requirements/torch.lock", "--constraint", "requirements/test.lock"]
CUDA_PREFIXES = ("nvidia-", "cuda-")


def pip_install(*options: str) -> list[str]:
    return [sys.executable, "-m", "pip", "install", "--quiet", *LOCKED, *options]


def cuda_packages() -> list[str]:
    """Names of the CUDA packages that pip would install together with torch.

    Raises:
        subprocess.CalledProcessError: pip found no such torch, or no network. It has said why.
    """
    planned = subprocess.run(
        pip_install("--dry-run", "--report", "-"), stdout=subprocess.PIPE, text=True, check=True
    )
    names = [item["metadata"]["name"].lower() for item in json.loads(planned.stdout)["install"]]
    return sorted(name for name in names if name.startswith(CUDA_PREFIXES))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allow-cuda", action="store_true", help="install a CUDA build as well")
    arguments = parser.parse_args(argv)
    try:
        cuda = [] if arguments.allow_cuda else cuda_packages()
        if cuda:
            print(
                f"torch was not installed: pip found only a CUDA build, with {len(cuda)} more"
                f" packages of several GB ({', '.join(cuda[:3])}, ...). The comparisons with"
                " transformers will be skipped. To run them, point pip at torch's CPU wheels with"
                " PIP_EXTRA_INDEX_URL=<index> or PIP_FIND_LINKS=<folder>, or accept the CUDA build"
                " with ALLOW_CUDA_TORCH=1.",
                file=sys.stderr,
            )
            return 1 if os.environ.get("CI") else 0
        subprocess.run(pip_install(), check=True)
    except subprocess.CalledProcessError as error:
        print("torch was not installed: pip says why above.", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
