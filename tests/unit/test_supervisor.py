"""The supervisor with plain programs: what it passes on, and that nothing of them is left."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from internvl_triton import supervisor
from internvl_triton.supervisor import KILL_NOW, SHARED_MEMORY, supervised
from tests.integration.processes import is_alive

# Shell: a child in another session that only SIGKILL ends; its process id is then `$!`.
DEAF_CHILD = "trap '' TERM INT QUIT HUP; setsid sleep 600 &"


def run(*command: str, prefix: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        supervised(command, shared_memory_prefix=prefix),
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextmanager
def running(script: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A supervised shell script, and the process ids on the first line that it prints."""
    command = supervised(["/bin/sh", "-c", script])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.send_signal(KILL_NOW)


def exists(pid: int) -> bool:
    """Whether there is such a process, be it one that ended and that nobody has reaped."""
    return Path(f"/proc/{pid}").exists()


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("code", [0, 3, 255])
def test_exit_code_is_the_programs(code: int) -> None:
    assert run("/bin/sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT])
def test_a_killed_program_looks_killed(number: signal.Signals) -> None:
    # What a shell starts in the background ignores SIGQUIT, and so do its children.
    before = signal.signal(number, signal.SIG_DFL) if number == signal.SIGQUIT else None
    try:
        assert run("/bin/sh", "-c", f"kill -{int(number)} $$").returncode == -number
    finally:
        if before is not None:
            signal.signal(number, before)


def test_a_program_that_cannot_be_started_is_named() -> None:
    done = run("/nowhere/program")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "cannot start /nowhere/program: No such file or directory\n"


def test_output_and_arguments_pass_unchanged() -> None:
    done = run("/bin/echo", "a b", "", "$c")
    assert (done.returncode, done.stdout) == (0, "a b  $c\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    with running(f"trap 'exit 7' {name}; echo $$; while :; do sleep 0.05; done") as (process, _):
        process.send_signal(number)
        assert process.wait(30) == 7


def test_the_program_receives_all_signals() -> None:
    blocked = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert run(sys.executable, "-c", blocked).stdout == "set()\n"


def test_an_orphan_is_killed_and_reaped() -> None:
    done = run("/bin/sh", "-c", f"{DEAF_CHILD} echo $!; exit 5")
    assert done.returncode == 5
    assert not exists(int(done.stdout))


def test_orphans_of_orphans_are_killed_and_reaped() -> None:
    inner = f"({DEAF_CHILD} echo $!; exec sleep 600)"
    script = f"echo $$; ({inner} & echo $!; exec sleep 600) & echo $!; wait"
    with running(script) as (process, (program,)):
        assert process.stdout is not None
        orphans = [int(process.stdout.readline()) for _ in range(3)]
        os.kill(program, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not any(map(exists, orphans))


def test_a_killed_program_leaves_no_orphan() -> None:
    with running(f"{DEAF_CHILD} echo $$ $!; sleep 600; exit") as (process, ids):
        program, orphan = ids
        assert exists(orphan)
        os.kill(program, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not exists(orphan)


def test_an_orphan_that_ends_by_itself_is_reaped_meanwhile() -> None:
    with running("(sleep 0.1 & echo $!); sleep 600; exit") as (process, (orphan,)):
        assert eventually(lambda: not exists(orphan))
        assert process.poll() is None


def test_kill_now_ends_a_program_that_ignores_sigterm() -> None:
    script = f"{DEAF_CHILD} echo $$ $!; sleep 600; exit"
    with running(script) as (process, ids):
        process.send_signal(signal.SIGTERM)
        process.send_signal(KILL_NOW)
        assert process.wait(30) == -signal.SIGKILL
        assert not any(map(exists, ids))


def test_everything_ends_with_the_parent() -> None:
    script = f"{DEAF_CHILD} echo $$ $!; sleep 600; exit"
    starter = (
        "import subprocess\n"
        "from internvl_triton.supervisor import supervised\n"
        f"command = supervised(['/bin/sh', '-c', {script!r}])\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline(), flush=True)\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, timeout=60
    )
    ids = [int(word) for word in done.stdout.split()]
    assert len(ids) == 2
    assert eventually(lambda: not any(map(exists, ids)))


def test_the_program_ends_with_a_killed_supervisor() -> None:
    with running("trap '' TERM; echo $$; exec sleep 600") as (process, (program,)):
        process.kill()
        assert eventually(lambda: not is_alive(program))


def test_program_is_not_started_for_a_dead_parent() -> None:
    not_its_parent = os.getppid()
    arguments = [supervisor.__file__, str(not_its_parent), "", "/bin/echo", "started"]
    ended = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_ignored_sigchld_is_not_inherited() -> None:
    """A parent that ignores it passes that on, and then no child could be waited for."""
    command = supervised(["/bin/sh", "-c", f"{DEAF_CHILD} echo $!; exit 4"])
    shell = ["/bin/sh", "-c", "trap '' CHLD; exec \"$@\"", "sh", *command]
    done = subprocess.run(shell, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 4
    assert not exists(int(done.stdout))


@pytest.fixture
def regions() -> Iterator[tuple[Path, Path]]:
    """Two shared-memory regions; the second one's name starts as the first one's does not."""
    token = secrets.token_hex(6)
    ours, others = SHARED_MEMORY / f"test_{token}_1", SHARED_MEMORY / f"other_test_{token}_1"
    for region in (ours, others):
        region.write_bytes(b"0")
    yield ours, others
    for region in (ours, others):
        region.unlink(missing_ok=True)


def test_only_the_programs_shared_memory_is_removed(regions: tuple[Path, Path]) -> None:
    ours, others = regions
    assert run("/bin/sh", "-c", "exit 0", prefix="").returncode == 0
    assert ours.exists()
    script = f'[ -e {ours} ] && kill -9 "$$"'  # still there while it runs
    assert run("/bin/sh", "-c", script, prefix=ours.name[:-1]).returncode == -signal.SIGKILL
    assert not ours.exists()
    assert others.exists()
