"""What this kernel and this process may do, found by trying and never by who the user is.

Nothing is kept: each call tries anew, in a few milliseconds each (those that look at another
task start a short-lived Python). docs/privileges.md has the table feature x privilege.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket as sockets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memdesc import _core
from memdesc.errors import InvalidArgument, MemdescError, describe_errno
from memdesc.vm.cgroups import memory_cgroups
from memdesc.vm.pages import page_size
from memdesc.vm.physical import frames
from memdesc.vm.regions import region_at
from memdesc.vm.task import SO_PEERPIDFD, Task

# asm-generic/mman.h and the x86, Arm and RISC-V headers; not in the standard library.
_MAP_LOCKED = 0x2000
_MAP_NORESERVE = 0x4000

_MARK = b"memdesc was here"
# Tells where it keeps the mark and stays until its input ends. Undumpable, it is what a task of
# another user is: only CAP_SYS_PTRACE reaches it (prctl 4 is PR_SET_DUMPABLE).
_CHILD = f"mark = {_MARK!r}; print(id(mark), flush=True); import sys; sys.stdin.read()"
_UNDUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); "


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel allows this process or denies it.

    Attributes
    ----------
    name : str
    available : bool
        Whether it worked when tried just now.
    why : str
        What was found: the kernel's answer, or the limit in words.
    needs : str
        The kernel version and the privilege.
    remedy : str
        What to do where it is denied, or what the library does instead.
    limit : int or None
        Bytes, for features that have one; None: no limit, or none that was found.
    """

    name: str
    available: bool
    why: str
    needs: str
    remedy: str
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """It works, and this is how."""

    why: str = "works"
    limit: int | None = None


class _Lacking(Exception):
    """It was tried and is not there; the text says what was found."""


@dataclass(frozen=True, slots=True)
class _Trial:
    attempt: Callable[[], _Found]
    needs: str
    remedy: str


def probe() -> tuple[Feature, ...]:
    """Try every feature, and tell what came of it.

    Linux: starts three short-lived child processes; locks no page and takes no memory but a few
    pages. Threads: safe beside others.
    """
    return tuple(probe_feature(name) for name in FEATURES)


def probe_feature(name: str) -> Feature:
    """Try one feature of `FEATURES`.

    Raises
    ------
    InvalidArgument
        There is none of that name.

    Examples
    --------
    >>> probe_feature("memfd_seals").available
    True
    """
    trial = _TRIALS.get(name)
    if trial is None:
        raise InvalidArgument(
            f"no feature is called {name!r}: there are {', '.join(FEATURES)}", errno=errno.EINVAL
        )
    try:
        found = trial.attempt()
    except (_Lacking, MemdescError) as error:
        return Feature(name, False, str(error), trial.needs, trial.remedy)
    except OSError as error:
        return Feature(name, False, describe_errno(error), trial.needs, trial.remedy)
    return Feature(name, True, found.why, trial.needs, trial.remedy, found.limit)


@contextmanager
def _memfd(flags: int) -> Iterator[int]:
    fd = os.memfd_create("memdesc-probe", flags | os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _add_seals(fd: int, seals: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals != seals:
        raise _Lacking("the kernel took the seals and does not show them")


def _memfd_seals() -> _Found:
    with _memfd(os.MFD_ALLOW_SEALING) as fd:
        _add_seals(fd, _core.F_SEAL_GROW | _core.F_SEAL_SHRINK | _core.F_SEAL_SEAL)
    return _Found()


def _future_write_seal() -> _Found:
    with _memfd(os.MFD_ALLOW_SEALING) as fd:
        os.ftruncate(fd, page_size)
        _add_seals(fd, _core.F_SEAL_FUTURE_WRITE)
        try:
            mmap.mmap(fd, page_size).close()
        except PermissionError:
            return _Found("a new writable mapping of sealed memory is refused")
    raise _Lacking("the kernel took the seal and lets sealed memory be mapped writable")


def _noexec_seal() -> _Found:
    with _memfd(_core.MFD_NOEXEC_SEAL) as fd:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _core.F_SEAL_EXEC:
            return _Found()
    raise _Lacking("the kernel took the flag and set no seal")


def _huge_pages() -> _Found:
    with _memfd(os.MFD_HUGETLB) as fd:
        size = os.fstat(fd).st_blksize
        os.ftruncate(fd, size)
        try:
            mmap.mmap(fd, size).close()  # takes the page out of the pool, or is refused
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise _Lacking(f"the pool of pages of {size:,} bytes has none free") from error
    return _Found(f"a page of {size:,} bytes was had")


@contextmanager
def _own_page() -> Iterator[int]:
    """Give the address of a page of shared anonymous memory, present."""
    with mmap.mmap(-1, page_size) as page:
        page[0] = 1
        yield _core.buffer_address(page)[0]


def _page_frames() -> _Found:
    with _own_page() as address, Task.current() as task:
        if frames(task, address, page_size)[0] is None:
            raise _Lacking("the kernel shows a page that was just written as not present")
    return _Found("frames are shown")


def _map_files() -> _Found:
    with _own_page() as address, Task.current() as task:
        region = region_at(task, address)
        if region is None:
            raise _Lacking("/proc/self/maps does not show memory that was just mapped")
        link = task.proc_path(f"map_files/{region.start:x}-{region.end:x}")
        os.close(os.open(link, os.O_RDWR | os.O_CLOEXEC))
    return _Found()


@contextmanager
def _child(prelude: str = "") -> Iterator[tuple[Task, int]]:
    """Start a task of our own; give it, and the address of the mark in it."""
    if not sys.executable:
        raise _Lacking("this program does not know a Python to start a child with")
    command = [sys.executable, "-I", "-S", "-c", prelude + _CHILD]
    pipe = subprocess.PIPE
    try:
        started = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise _Lacking(f"a child to try it on can not be started: {error}") from error
    with started as child:
        try:
            told = child.stdout.readline() if child.stdout else b""
            if not told:
                raise _Lacking("the child to try it on ended at once")
            with Task(child.pid) as task:
                yield task, int(told) + bytes.__basicsize__ - 1  # where CPython keeps the bytes
        finally:
            child.kill()


def _pidfd_getfd() -> _Found:
    with _child() as (task, _):
        os.close(_core.pidfd_getfd(task.fileno(), 0))
    return _Found("a child's descriptor was had")


def _read_mark(task: Task, address: int) -> None:
    found = bytearray(len(_MARK))
    _core.process_vm_readv(task.pid, found, address)
    if found != _MARK:
        raise _Lacking("process_vm_readv gave other bytes than the task holds")


def _copy_other_task() -> _Found:
    with _child() as (task, address):
        _read_mark(task, address)
    return _Found("a child's memory was read")


def _copy_any_task() -> _Found:
    with _child(_UNDUMPABLE) as (task, address):
        _read_mark(task, address)
    return _Found("the memory of a child that only CAP_SYS_PTRACE reaches was read")


def _lock_memory() -> _Found:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # A locked mapping without access counts against the limit and takes no page.
    flags = _core.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_LOCKED
    length = page_size if soft == resource.RLIM_INFINITY else soft // page_size * page_size
    try:
        _core.map_memory(0, length + page_size, _core.PROT_NONE, flags, -1, 0)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOMEM):
            raise
        return _Found(f"up to RLIMIT_MEMLOCK, {soft:,} bytes in all", soft)
    return _Found("without limit")


def _memory_cgroup() -> _Found:
    groups = memory_cgroups()
    if not groups:
        raise _Lacking("no memory cgroup of this process is to be seen")
    limited = [(group.limit, group.folder) for group in groups if group.limit is not None]
    if not limited:
        return _Found("no limit is set")
    limit, folder = min(limited)
    return _Found(f"{folder} limits it to {limit:,} bytes", limit)


def _swap() -> _Found:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SwapTotal:") and (total := int(line.split()[1]) * 1024):
            return _Found(f"{total:,} bytes", total)
    raise _Lacking("the machine has no swap: anonymous and shared memory is never paged out")


def _populate() -> _Found:
    with mmap.mmap(-1, page_size) as page:
        _core.madvise(_core.buffer_address(page)[0], page_size, _core.MADV_POPULATE_WRITE)
    return _Found()


def _io_uring() -> _Found:
    ring = _core.open_uring(1, 1, 0)
    try:
        with mmap.mmap(-1, page_size) as page:
            _core.uring_register_buffers(ring, 1)
            try:
                _core.uring_update_buffer(ring, 0, _core.buffer_address(page)[0], page_size)
            except OSError as error:
                return _Found(f"works, but registers no memory: {describe_errno(error)}")
    finally:
        ring.close()
    return _Found("a page was registered")


def _peer_pidfd() -> _Found:
    ours, theirs = sockets.socketpair(sockets.AF_UNIX)
    with ours, theirs:
        os.close(ours.getsockopt(sockets.SOL_SOCKET, SO_PEERPIDFD))
    return _Found()


_MAY_TRACE = "the task's own user (yama.ptrace_scope 0, or 1 for children), or CAP_SYS_PTRACE"
_TRIALS = {
    "memfd_seals": _Trial(
        _memfd_seals, "Linux 3.17", "none: without memfds there are no buffers to share"
    ),
    "future_write_seal": _Trial(
        _future_write_seal, "Linux 5.1", "share with max_access=READ_WRITE, or upgrade the kernel"
    ),
    "noexec_seal": _Trial(_noexec_seal, "Linux 6.3", "buffers are made without it"),
    "populate": _Trial(
        _populate, "Linux 5.14", "none: Linux 5.14 is the oldest that memdesc works on"
    ),
    "peer_pidfd": _Trial(
        _peer_pidfd, "Linux 6.5", "the peer's pid is opened instead, which may have been recycled"
    ),
    "io_uring": _Trial(
        _io_uring,
        "Linux 5.13, kernel.io_uring_disabled 0",
        "files are read by pread, one request after the other; in a container allow io_uring_setup",
    ),
    "huge_pages": _Trial(
        _huge_pages, "free pages in the pool", "raise vm.nr_hugepages; base pages are used instead"
    ),
    "page_frames": _Trial(
        _page_frames, "CAP_SYS_ADMIN", "VM objects are compared instead of frames"
    ),
    "map_files": _Trial(
        _map_files,
        "CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (Linux 5.9)",
        "pidfd_getfd of the task's descriptor is tried next, then copyin and copyout remain",
    ),
    "pidfd_getfd": _Trial(
        _pidfd_getfd,
        f"Linux 5.6; {_MAY_TRACE}",
        "copyin and copyout through a connection; in a container allow the call",
    ),
    "copy_other_task": _Trial(
        _copy_other_task,
        _MAY_TRACE,
        "copyin and copyout through a connection; in a container allow process_vm_readv",
    ),
    "copy_any_task": _Trial(
        _copy_any_task, "CAP_SYS_PTRACE", "run as the task's user, or connect to it"
    ),
    "lock_memory": _Trial(
        _lock_memory,
        "RLIMIT_MEMLOCK above 0, or CAP_IPC_LOCK (no limit)",
        "raise `ulimit -l`, or the container's --ulimit memlock",
    ),
    "memory_cgroup": _Trial(
        _memory_cgroup,
        "a memory cgroup hierarchy that is mounted",
        "mount /sys/fs/cgroup; without it a limit is not seen before the kernel kills for it",
    ),
    "swap": _Trial(_swap, "a swap device", "swapon, where paging is wanted"),
}

FEATURES = tuple(_TRIALS)
"""The names that `probe_feature` takes."""
