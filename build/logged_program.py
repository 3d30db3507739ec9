"""Run one of NVIDIA's programs to its end: its output on the terminal and in a log."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from internvl_triton.errors import EngineBuildFailed
from internvl_triton.supervisor import supervised

__all__ = ["run_logged"]

LOG_LINES_SHOWN = 20
STOP_TIMEOUT_S = 10.0


def run_logged(name: str, command: Sequence[str], log_path: Path) -> None:
    """Run `command`, called `name` in messages.

    It gets a session of its own, so that whatever ends this function ends all its workers.
    Raises EngineBuildFailed with the end of the log when it fails.
    """
    end_of_log: deque[str] = deque(maxlen=LOG_LINES_SHOWN)
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            supervised(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                log.write(line)
                end_of_log.append(line.rstrip())
            exit_code = process.wait()
        finally:
            _end(process)
    if exit_code:
        how = f"exit code {exit_code}" if exit_code > 0 else f"signal {-exit_code}"
        why = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
        raise EngineBuildFailed(
            "\n".join([f"{name} failed with {how}{why}; the end of {log_path}:", *end_of_log])
        )


def _end(process: subprocess.Popen[str]) -> None:
    """End whatever is left of the process and its workers."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(STOP_TIMEOUT_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    if process.stdout is not None:
        process.stdout.close()
