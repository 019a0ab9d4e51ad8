"""Tasks that hold up whoever looks at them: a file whose server is deaf, a locked address space."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import as_json, memdesc
from fuse_disk import NoDisk, failing_disk
from puppets import Puppet, wait_until

from memdesc import _core
from memdesc.cli.words import program_of
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import AllocationError, MappingError, MappingReason, MemdescError, TimedOutError
from memdesc.vm import holders, patience
from memdesc.vm.holders import survey
from memdesc.vm.pages import Direction
from memdesc.vm.regions import details
from memdesc.vm.task import Task

MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
waiting: list[subprocess.Popen[bytes]] = []
"""Until the server ends."""


# --- A file that is asked of, and does not answer ---------------------------------------------

OPEN = """
mem = os.memfd_create("seen"); os.ftruncate(mem, 8192); os.fchmod(mem, 0o600)
deaf = os.open({path!r}, os.O_RDONLY)
"""
MAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]
"""
SWITCH = """
number = os.dup(mem)
def switch():
    while True:
        os.dup2(deaf, number)
        os.dup2(mem, number)
threading.Thread(target=switch, daemon=True).start()
"""


@pytest.fixture
def with_deaf_file(tmp_path: Path) -> Iterator[Puppet]:
    """A task with a file that looks like a memfd; who asks for its size waits for ever."""
    (tmp_path / "mount").mkdir()
    try:
        with Puppet() as other, failing_disk(tmp_path / "mount", MIB, deaf=True) as (path, _):
            other.do(OPEN.format(path=str(path.parent / "memfd:disk")))
            # A file of a file system that is no longer mounted anywhere has a path of its own.
            assert _libc.umount2(os.fsencode(path.parent), 2) == 0
            yield other
        for one in waiting:
            one.wait()
        waiting.clear()
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")


@pytest.mark.slow
def test_a_file_that_looks_like_a_memfd(with_deaf_file: Puppet) -> None:
    path = f"/proc/{with_deaf_file.pid}/fd/{with_deaf_file.do('deaf')}"
    assert os.readlink(path) == "/memfd:disk"
    stat = subprocess.Popen([sys.executable, "-ISc", f"import os; os.stat({path!r})"])
    waiting.append(stat)
    with pytest.raises(subprocess.TimeoutExpired):
        stat.wait(0.5)  # from now on not even SIGKILL ends it
    device, inode, *_ = _core.stat_cached(-1, path.encode())
    seen = tuple(with_deaf_file.do("[os.fstat(mem).st_dev, os.fstat(mem).st_ino]"))
    found = survey(pids=[with_deaf_file.pid]).objects
    assert found.keys() == {(device, inode), seen}
    assert found[seen].nbytes == 8192
    buffers = as_json("ls")["buffers"]
    assert [one["inode"] for told in buffers for one in told["objects"]].count(seen[1]) == 1
    assert memdesc("map", with_deaf_file.pid).returncode == 0


def test_a_number_that_becomes_that_file_meanwhile(with_deaf_file: Puppet) -> None:
    with_deaf_file.do(SWITCH)
    for _ in range(300):
        survey(pids=[with_deaf_file.pid])


def test_a_file_by_the_name_of_a_memfd_is_not_opened(with_deaf_file: Puppet) -> None:
    with_deaf_file.do(MAP)
    address = with_deaf_file.do("libc.mmap(0, 4096, 1, 1, deaf, 0)")
    with (
        Task(with_deaf_file.pid) as task,
        MemoryDescriptor.with_address_range(address, 4096, Direction.OUT, task=task) as theirs,
        pytest.raises(MappingError) as caught,
    ):
        theirs.map()
    assert caught.value.reason is MappingReason.CAN_SHRINK


# --- An address space that is locked ----------------------------------------------------------

# One of them reads a page of the file, which never comes: the page stays locked. All of them map
# the file as opened past the page cache, which waits for that page with their address space locked.
HOLD = """
import ctypes, os, sys, threading, time
path, count = sys.argv[1], int(sys.argv[2])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]
direct = os.open(path, os.O_RDONLY | os.O_DSYNC)
through = os.open(path, os.O_RDONLY)
for _ in range(count - 1):
    if not os.fork():
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG
        break
else:
    def read():
        try:
            os.pread(through, 1, 0)
        except OSError:  # the server ended
            pass
    threading.Thread(target=read, daemon=True).start()
mem = os.memfd_create("seen"); os.ftruncate(mem, 8192); os.fchmod(mem, 0o600)
at = libc.mmap(0, 8192, 3, 1, mem, 0)
os.write(1, b"%d %d\\n" % (os.getpid(), at))
while True:
    libc.mmap(0, 4096, 1, 2, direct, 0)
    time.sleep(0.01)
"""


@contextmanager
def locked_tasks(folder: Path, count: int) -> Iterator[list[tuple[int, int]]]:
    """Tasks whose address space is locked: pid, and the address of a memfd of 8 KiB there."""
    folder.mkdir()
    try:
        with failing_disk(folder, MIB, hang=0, stubborn=True) as (path, server):
            command = [sys.executable, "-ISc", HOLD, str(path), str(count)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
                assert first.stdout is not None
                try:
                    told = [first.stdout.readline().split() for _ in range(count)]
                    tasks = [(int(pid), int(at)) for pid, at in told]
                    for pid, _ in tasks:
                        wait_until(lambda pid=pid: state(pid) == "D")  # type: ignore[misc]
                    yield tasks
                finally:
                    server.kill()  # before that nothing ends them
                    first.kill()
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]


def looks() -> int:
    return sum(thread.name == "memdesc-look" for thread in threading.enumerate())


@pytest.mark.slow
def test_tasks_with_a_locked_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    with locked_tasks(tmp_path / "mount", 5) as tasks:
        pids = [pid for pid, _ in tasks]
        with Task(pids[0]) as task:
            with pytest.raises(TimedOutError) as caught:
                details(task)
            assert caught.value.errno == errno.ETIMEDOUT
            assert looks() == 1
            monkeypatch.setattr(patience, "PATIENCE", 3600.0)  # it is not waited for again
            with pytest.raises(TimedOutError):
                details(task)
            assert program_of(pids[0]).startswith("python")
            with MemoryDescriptor.with_address_range(
                tasks[0][1], 8192, Direction.OUT, task=task
            ) as theirs:
                with pytest.raises(MappingError) as refused:
                    theirs.map()
            assert refused.value.reason is MappingReason.NOT_ANSWERING
            assert looks() == 1
        monkeypatch.setattr(patience, "PATIENCE", 0.3)
        assert survey(pids=pids).held_up_pids == pids
        assert looks() == patience._MOST_HELD_UP  # those of one user: the fifth is not looked at
        with Puppet() as other:  # he pays for his others
            assert survey(pids=[other.pid]).held_up_pids == [other.pid]
    wait_until(lambda: looks() == 0)
    with Puppet() as other:
        assert survey(pids=[other.pid]).held_up_pids == []


# --- How a look is taken ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_look_that_computes_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)

    def compute() -> float:
        while time.thread_time() < 0.7:
            pass
        return time.thread_time()

    with Puppet() as other, Task(other.pid) as task:
        assert patience.look_at(task, "test", compute) >= 0.7


def test_what_a_look_gives_after_it_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.05)
    go_on = threading.Event()
    undone: list[str] = []

    def look() -> str:
        go_on.wait()
        return "opened"

    with Puppet() as other, Task(other.pid) as task:
        with pytest.raises(TimedOutError):
            patience.look_at(task, "test", look, undone.append)
        assert undone == []
        go_on.set()
        wait_until(lambda: looks() == 0)
        assert undone == ["opened"]
        assert details(task)


def test_what_a_look_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EACCES, "no")

    with Puppet() as other, Task(other.pid) as task, pytest.raises(PermissionError):
        patience.look_at(task, "test", refuse)


def test_no_thread_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Puppet() as other, Task(other.pid) as task:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(AllocationError) as caught:
            details(task)
    assert caught.value.errno == errno.EAGAIN


def test_a_file_without_end() -> None:
    with pytest.raises(MemdescError) as caught:
        patience.read_file("/proc/self/maps", 100)
    assert caught.value.errno == errno.EFBIG


def test_a_user_whose_tasks_take_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with Puppet() as other:
        monkeypatch.setattr(holders, "_MOST_OF_A_USER", 0.0)
        assert survey(pids=[other.pid]).held_up_pids == [other.pid]
        assert "held up the look" in " ".join(memdesc("ls").stdout.split())
