"""Large buffers that come and go: their pages are the kernel's work once, not every time."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
import numpy as np
from internvl_triton.freed_memory import keep_freed_memory
{keep}
def faults_of_a_picture():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    decoded, packed = np.ones(8 * 2**20, np.uint8), np.ones(9 * 2**20, np.uint8)
    tiles = np.ones(5 * 2**20, np.uint8)
    del decoded, packed, tiles
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults_of_a_picture() for _ in range(6)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_freed_memory_is_used_again() -> None:
    def faults(keep: str) -> int:
        command = [sys.executable, "-c", CODE.format(keep=keep)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(found.stdout)

    assert faults("keep_freed_memory()") < 100
    assert faults("") > 1000  # 22 MB are 5632 pages: what the setting is there for
