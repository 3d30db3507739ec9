"""Ends a model's process when its tritonserver is gone.

WAR: a stub of the Python backend whose server was killed normally ends within a second. But a
thread that is asking the server something at that moment (such as `is_cancelled`) waits for ever,
and the stub with it: an orphan process and its shared memory stay behind. The supervisor clears
both away; this is for a server that runs without one, or whose supervisor was killed.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

__all__ = ["exit_with_server"]

POLL_S = 0.5
GRACE_S = 3.0  # for the stub's own way out, which also removes its shared memory


def exit_with_server() -> None:
    """Start the watch, once per model process, from `initialize`."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(server_pid: int) -> None:
    while os.getppid() == server_pid:
        time.sleep(POLL_S)
    time.sleep(GRACE_S)
    _shared_memory_region().unlink(missing_ok=True)
    os._exit(1)


def _shared_memory_region() -> Path:
    """Of this process: the stub's second argument, after the model's file."""
    arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    name = arguments[2].decode() if len(arguments) > 2 else ""
    return Path("/dev/shm") / (Path(name).name or "none")
