"""What a server leaves behind, looked up in /proc and /dev/shm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["children_of", "eventually", "is_alive", "processes_naming", "shared_memory_of"]


def children_of(pid: int) -> list[int]:
    """Live processes whose parent is `pid`; one that ended and was not reaped is not alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_naming(text: str | Path) -> list[int]:
    """Ids of live processes with `text` in their command line, such as a server's repository."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(text).encode() in command:  # empty for zombies
            found.append(int(path.parent.name))
    return found


def shared_memory_of(launcher: int) -> list[str]:
    """Names of the shared-memory regions of servers that the process `launcher` started."""
    return sorted(path.name for path in Path("/dev/shm").glob(f"internvl_{launcher}_*"))


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
