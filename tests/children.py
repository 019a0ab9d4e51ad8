"""Runs functions in forked children: with less rights, to see what they inherit, to kill them."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None)


class ChildFailed(AssertionError):
    """The child raised; the message is its traceback."""


def in_child(
    function: Callable[..., Any],
    *arguments: Any,
    before: Callable[[], None] | None = None,
    timeout: float = 60,
) -> Any:
    """Give what `function` returns in a forked child; a failure or skip there is one here."""
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        _run(function, arguments, before, writer)
    os.close(writer)
    try:
        answer = _receive(reader, timeout)
    finally:
        os.close(reader)
        _end(pid)
    if not answer:
        raise ChildFailed(f"the child {pid} ended without an answer, or gave none in {timeout} s")
    outcome, value = pickle.loads(answer)
    if outcome == "skip":
        pytest.skip(value)
    if outcome == "failure":
        raise ChildFailed(value)
    return value


def start(function: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a forked child, which exits with 0 if it returns, and ends with us."""
    pid = _fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        function(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 (shown, and told by the exit code)
        traceback.print_exc()
    finally:
        os._exit(code)


def is_idle(pid: int) -> bool:
    """Whether a process sleeps, and does nothing for half a second."""

    def spent() -> tuple[str, int]:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])

    _, before = spent()
    time.sleep(0.5)
    state, after = spent()
    return state == "S" and after - before < os.sysconf("SC_CLK_TCK") // 20


def finish(pid: int) -> int:
    """Wait for a child: its exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert finish(pid) == -signal.SIGKILL


def _fork() -> int:
    with warnings.catch_warnings():
        # CPython 3.12 warns where threads are about (the watchdog of the tests is one).
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _end(pid: int) -> None:
    """Wait for a child that has answered, or kill it: in an endless loop it never does."""
    for _ in range(200):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    before: Callable[[], None] | None,
    writer: int,
) -> None:
    outcome: tuple[str, Any]
    try:
        die_with_parent()
        if before is not None:
            before()
            die_with_parent()  # becoming another user undoes it: prctl(2)
        outcome = "value", function(*arguments)
    except pytest.skip.Exception as skipped:
        outcome = "skip", str(skipped)
    except BaseException:  # noqa: BLE001 (it goes to the parent, whole)
        outcome = "failure", traceback.format_exc()
    try:
        with open(writer, "wb") as pipe:
            pickle.dump(outcome, pipe)
    finally:
        os._exit(0)


def die_with_parent() -> None:
    """Be killed when the thread that forked ends: a test's watchdog may end the parent first."""
    assert _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def _receive(reader: int, timeout: float) -> bytes:
    received = bytearray()
    while select.select([reader], [], [], timeout)[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        received += part
    return bytes(received)


def capability(bit: int) -> bool:
    """Whether this process holds a capability, by its number in linux/capability.h."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> bit & 1)


def become(uid: int) -> None:
    """Be another user from here on, or skip."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except PermissionError as error:
        pytest.skip(f"this user can not become another one: {error}")


def limit_locking(nbytes: int) -> None:
    """Be held to `nbytes` of RLIMIT_MEMLOCK: without CAP_IPC_LOCK, which lifts it."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (nbytes, nbytes))
    if capability(14):
        become(NOBODY)
