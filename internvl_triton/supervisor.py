"""Runs a program so that nothing of it is left behind, however it or its starter ends.

    python supervisor.py PARENT_PID SHARED_MEMORY_PREFIX PROGRAM [ARGUMENT ...]

- Processes of the program that lose their parent become children of the supervisor. When the
  program ends, all of them are killed and reaped (process 1 of a container may reap nobody).
- Then shared-memory regions whose names start with SHARED_MEMORY_PREFIX are removed; "" removes
  none.
- SIGTERM and SIGINT are passed on to the program. SIGQUIT kills it, and so does the end of the
  thread that started the supervisor.
- The supervisor ends as the program did: with its exit code, or by the same signal.
- If the supervisor itself is killed, the kernel kills the program.

A program of its own: it must be the parent of every orphan and outlive the process that started
it. Linux only; standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["KILL_NOW", "supervised"]

SHARED_MEMORY = Path("/dev/shm")
KILL_NOW = signal.SIGQUIT
FORWARDED = {signal.SIGTERM, signal.SIGINT}
AWAITED = {signal.SIGCHLD, KILL_NOW, *FORWARDED}
CANNOT_START = 127  # as a shell has it
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


def supervised(command: Sequence[str], *, shared_memory_prefix: str = "") -> list[str]:
    """The command that runs `command` under a supervisor, for the calling process to start."""
    program = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    return [*program, str(os.getpid()), shared_memory_prefix, *command]


def remove_shared_memory(prefix: str) -> None:
    """Remove the shared-memory regions whose names start with `prefix`; "" removes none."""
    if prefix:
        for region in SHARED_MEMORY.glob(f"{prefix}*"):
            region.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parent, prefix, *command = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would vanish unseen
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, KILL_NOW)
    if os.getppid() != int(parent):  # it died before the line above
        return 1
    status = _run(command)
    _end_orphans()
    remove_shared_memory(prefix)
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code < 0:
        _die_of(-exit_code)
    return exit_code


def _run(command: Sequence[str]) -> int:
    """Run the program to its end. Its wait status."""
    program = _start(command)
    while True:
        received = signal.sigwait(AWAITED)
        if received == KILL_NOW:
            os.kill(program, signal.SIGKILL)
        elif received in FORWARDED:
            os.kill(program, received)
        else:
            for pid, status in _ended_children():
                if pid == program:
                    return status


def _start(command: Sequence[str]) -> int:
    supervisor = os.getpid()
    program = os.fork()
    if program:
        return program
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
        os._exit(CANNOT_START)


def _ended_children() -> list[tuple[int, int]]:
    """(process id, wait status) of every child that has ended. Reaps them."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(child)
    return ended


def _end_orphans() -> None:
    """Kill and reap all children; the children of each become ours when it dies."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children():
                os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """Children of this process, those that have ended but were not reaped included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(path.parent.name))
    return found


def _die_of(number: int) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has written its own
    with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(main())
