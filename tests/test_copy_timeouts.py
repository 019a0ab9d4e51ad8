"""Copies with a time limit: of memory whose task does not let the kernel have it."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuse_disk import NoDisk, failing_disk
from puppets import Puppet, wait_until

import memdesc as md
from memdesc import _core
from memdesc.copyio import copyin_into, transfer
from memdesc.vm import patience
from memdesc.vm.regions import details

PAGE = md.page_size
MAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]
"""
PRIVATE, ANONYMOUS, READ_WRITE = 2, 0x20, 3
SMALL = 8
LONG = 3600.0

Copy = Callable[[md.Task, int, bytearray, float], Any]
COPIES: dict[str, Copy] = {
    "copyin": lambda task, at, into, timeout: into.__setitem__(
        slice(None), md.copyin(task, at, len(into), timeout=timeout)
    ),
    "copyin_into": lambda task, at, into, timeout: copyin_into(task, at, into, timeout=timeout),
    "copyinstr": lambda task, at, into, timeout: md.copyinstr(task, at, 64, timeout=timeout),
    "copyout": lambda task, at, into, timeout: md.copyout(into, task, at, timeout=timeout),
    "to another": lambda task, at, into, timeout: md.copy_between(
        md.Task.current(), _core.buffer_address(into)[0], task, at, len(into), timeout=timeout
    ),
    "within it": lambda task, at, into, timeout: md.copy_between(
        task, at, task, at + 2 * SMALL, SMALL, timeout=timeout
    ),
}


@pytest.fixture
def other() -> Iterator[tuple[md.Task, int]]:
    """A task, and the address of a page there, the last of its mapping."""
    with Puppet() as puppet:
        puppet.do(MAP)
        at = puppet.do(f"libc.mmap(0, {3 * PAGE}, {READ_WRITE}, {PRIVATE | ANONYMOUS}, -1, 0)")
        puppet.do(f"libc.munmap(ctypes.c_void_p({at + 2 * PAGE}), {PAGE})")
        with md.Task(puppet.pid) as task:
            yield task, at + PAGE


def looks() -> int:
    return sum(thread.name == "memdesc-look" for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
def test_a_page_that_never_comes(how: str, tmp_path: Path) -> None:
    """Of a file whose server does not answer: only the end of one of the three ends the copy."""
    try:
        with (
            Puppet() as puppet,
            failing_disk(tmp_path, 4 * PAGE, hang=0, stubborn=True) as (path, server),
            md.Task(puppet.pid) as task,
        ):
            puppet.do(MAP)
            puppet.do(f"fd = os.open({str(path)!r}, os.O_RDWR)")
            at = puppet.do(f"libc.mmap(0, {PAGE}, {READ_WRITE}, {PRIVATE}, fd, 0)")
            into = bytearray(b"before" * 4)
            with pytest.raises(md.TimedOutError) as caught:
                COPIES[how](task, at, into, 0.1)
            assert caught.value.errno == errno.ETIMEDOUT
            assert looks() == 1
            # Until it lets go it is not waited for again, however long that would be.
            for again in (lambda: COPIES[how](task, at, into, LONG), lambda: details(task)):
                with pytest.raises(md.TimedOutError):
                    again()
            assert looks() == 1
            server.kill()
            wait_until(lambda: looks() == 0)
            assert into == b"before" * 4
            with pytest.raises(md.CopyError):  # now it is an error
                COPIES[how](task, at, into, LONG)
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")


@pytest.mark.parametrize("timeout", [LONG, None])
def test_what_is_copied_in_time_is_what_is_copied_without(
    other: tuple[md.Task, int], timeout: float | None
) -> None:
    task, at = other
    into, own = bytearray(6), md.Task.current()
    assert md.copyout(b"words\0", task, at, timeout=timeout) == 6
    assert md.copyin(task, at, 6, timeout=timeout) == b"words\0"
    assert copyin_into(task, at, into, timeout=timeout) == 6
    assert into == b"words\0"
    assert md.copyinstr(task, at, 64, timeout=timeout) == b"words"
    assert md.copy_between(task, at, task, at + 8, 6, timeout=timeout) == 6
    assert md.copyin(task, at + 8, 5, timeout=timeout) == b"words"
    assert md.copyin(own, _core.buffer_address(into)[0], 5, timeout=timeout) == b"words"
    assert md.copyin(task, at, 0, timeout=timeout) == b""
    assert md.copyout(b"", task, at, timeout=timeout) == 0


@pytest.mark.parametrize("timeout", [LONG, None])
def test_what_came_before_a_fault_is_there(
    other: tuple[md.Task, int], timeout: float | None
) -> None:
    task, at = other
    md.copyout(b"end", task, at + PAGE - 3)
    into = bytearray(b"......")
    with pytest.raises(md.CopyError) as caught:
        copyin_into(task, at + PAGE - 3, into, timeout=timeout)
    assert (caught.value.completed, into) == (3, b"end...")
    with pytest.raises(md.CopyError) as caught:
        md.copyout(b"......", task, at + PAGE - 3, timeout=timeout)
    assert caught.value.completed == 3
    assert md.copyin(task, at + PAGE - 3, 3) == b"..."


@pytest.mark.parametrize("how", COPIES)
def test_what_comes_late_touches_nothing_here(
    how: str, other: tuple[md.Task, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is begun after the time: neither a further step, nor what would be written."""
    task, at = other
    go_on, calls = threading.Event(), []

    def late(name: str) -> Callable[..., int]:
        real = getattr(_core, name)

        def move(*arguments: Any) -> int:
            calls.append(name)
            go_on.wait(20)
            return int(real(*arguments))

        return move

    into = bytearray(b"before" * 4)
    md.copyout(b"a" * 64, task, at)
    with monkeypatch.context() as patched:
        for name in ("process_vm_readv", "process_vm_writev"):
            patched.setattr(_core, name, late(name))
        patched.setattr(transfer, "STEP", SMALL)
        with pytest.raises(md.TimedOutError):
            COPIES[how](task, at, into, 0.01)
        into[:] = b"mine" * 6  # nothing keeps it
        into.extend(b"more")
        go_on.set()
        wait_until(lambda: looks() == 0)
    assert len(calls) <= 1
    assert into == b"mine" * 6 + b"more"
    assert md.copyin(task, at, 24) in (b"a" * 24, b"before" * 4, b"before" * 1 + b"be" + b"a" * 16)


def test_with_no_time_nothing_is_copied(other: tuple[md.Task, int]) -> None:
    task, at = other
    with pytest.raises(md.TimedOutError):
        md.copyout(b"words", task, at, timeout=0)
    wait_until(lambda: looks() == 0)
    assert md.copyin(task, at, 5) == bytes(5)


def test_between_tasks_the_target_is_another_one(other: tuple[md.Task, int]) -> None:
    task, at = other
    room = bytearray(8)
    with pytest.raises(md.InvalidArgument) as caught:
        md.copy_between(task, at, md.Task.current(), _core.buffer_address(room)[0], 8, timeout=LONG)
    assert caught.value.errno == errno.EINVAL


def test_no_thread_and_an_interrupt(
    other: tuple[md.Task, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, at = other
    go_on = threading.Event()

    def late(*_: Any) -> int:
        go_on.wait(20)
        return 5

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(md.AllocationError) as caught:
            md.copyin(task, at, 5, timeout=LONG)
        assert caught.value.errno == errno.EAGAIN
    with monkeypatch.context() as patched:
        patched.setattr(_core, "process_vm_readv", late)
        patched.setattr(patience._Look, "wait", _interrupted(patience._Look.wait, interrupt))
        with pytest.raises(KeyboardInterrupt):
            md.copyin(task, at, 5, timeout=LONG)
        assert looks() == 1
        go_on.set()
        wait_until(lambda: looks() == 0)
    assert md.copyin(task, at, 5, timeout=LONG) == bytes(5)


NO_ROOM = """
import resource
import memdesc as md
from memdesc import _core
from memdesc.copyio import copyin_into
into = bytearray(64 << 20)
task, at = md.Task.current(), _core.buffer_address(into)[0]
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * md.page_size
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (held + (32 << 20), hard))
try:
    {how}
except md.AllocationError as error:
    print(error.errno)
"""


@pytest.mark.parametrize(
    "how",
    ["copyin_into(task, at, into, timeout=60.0)", "md.copyout(into, task, at, timeout=60.0)"],
)
def test_no_room_for_memory_of_its_own(how: str) -> None:
    """In a new process: a fork of this one may have as much that was freed and is mapped still."""
    command = [sys.executable, "-c", NO_ROOM.format(how=how)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(errno.ENOMEM)]


def _interrupted(wait: Any, interrupt: Any) -> Any:
    def waits(look: Any, timeout: float | None) -> Any:
        look._done.wait = interrupt
        return wait(look, timeout)

    return waits
