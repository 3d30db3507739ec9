"""Becomes another program that the kernel kills when the process that started it dies.

    python die_with_parent.py PARENT_PID PROGRAM [ARGUMENT ...]

A program of its own, because Python code between fork and exec (`preexec_fn`) can deadlock in a
process that has threads. Linux only; standard library only.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    parent, *command = sys.argv[1:] if argv is None else argv
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        return 1
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
