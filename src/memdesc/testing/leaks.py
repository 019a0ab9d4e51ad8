"""The leak guard: what a process holds before and after, and what it left behind between.

It reads the kernel's own lists (`/proc/self`, `/dev/shm`), never our books. What it can not
see: private memory, and what other processes hold. Threads are Python's.
"""

from __future__ import annotations

import gc
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from memdesc import _core
from memdesc.errors import MemdescError
from memdesc.memory.recycler import trim
from memdesc.vm.task import Task

__all__ = ["Leak", "LeakError", "LeakKind", "Resources", "find_leaks", "leak_guard"]

_SHM = Path("/dev/shm")

# Mappings that the C library makes once and keeps: its table of character sets, and the page
# that libffi makes callbacks in.
_LASTING_MAPPINGS = re.compile(r"/gconv-modules\.cache$|^/memfd:libffi")

# Processes that multiprocessing starts once and keeps until this one ends.
_LASTING_CHILDREN = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

_WALL = 0x40000000  # linux/wait.h: children of every kind

# The one thread of a process with connections; it waits on one epoll and is woken by one
# eventfd. Both stay as long as the thread does, which is as long as the process.
_IO_THREAD = "memdesc-io"
_IO_THREAD_FDS = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")


class LeakKind(Enum):
    """What can be left behind."""

    FD = "fd"
    MAPPING = "mapping"
    LOCKED = "locked"
    THREAD = "thread"
    CHILD = "child"
    SHM = "shm"
    SOCKET = "socket"


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that was left behind, in words."""

    kind: LeakKind
    what: str


class LeakError(AssertionError):
    """Something was left behind; `leaks` lists it."""

    def __init__(self, leaks: Collection[Leak]) -> None:
        lines = [f"  {leak.kind.value:<8} {leak.what}" for leak in leaks]
        super().__init__("\n".join([f"{len(leaks)} left behind:", *lines]))
        self.leaks = tuple(leaks)


@dataclass(frozen=True, slots=True)
class Resources:
    """What this process holds at one moment.

    Attributes
    ----------
    fds : mapping of int to str
        Each descriptor and what the kernel says that it is (`/memfd:frames (deleted)`).
    mappings : mapping of str to int
        Bytes mapped of each shared object or memfd.
    locked : int
        Bytes locked (VmLck).
    threads, children : mapping of int to str
        By ident and by pid; children that ended and were not waited for included.
    shm, sockets : frozenset of str
        Names of this user in /dev/shm; sockets in `$MEMDESC_RUNTIME_DIR` where that is set.
    """

    fds: Mapping[int, str]
    mappings: Mapping[str, int]
    locked: int
    threads: Mapping[int, str]
    children: Mapping[int, str]
    shm: frozenset[str]
    sockets: frozenset[str]

    @classmethod
    def now(cls) -> Resources:
        """Read them. What the recycler keeps is given back first: it is no leak."""
        trim()
        return cls(
            fds=_read_fds(),
            mappings=_read_mappings(),
            locked=_read_locked(),
            threads={thread.ident: thread.name for thread in threading.enumerate() if thread.ident},
            children=_read_children(),
            shm=_read_shm(),
            sockets=_read_sockets(),
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, PermissionError):  # a container may have no /dev/shm
        return []


def _read_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own descriptor, closed by now
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return fds


def _read_mappings() -> dict[str, int]:
    mappings: dict[str, int] = {}
    with open("/proc/self/maps") as maps:
        for line in maps:
            bounds, rights, _, device, inode, *rest = line.split(maxsplit=5)
            path = rest[0].rstrip("\n") if rest else ""
            shared = rights.endswith("s") or path.startswith("/memfd:")
            if not shared or _LASTING_MAPPINGS.search(path):
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            name = f"{path} (device {device}, inode {inode})"
            mappings[name] = mappings.get(name, 0) + end - start
    return mappings


def _read_locked() -> int:
    match = re.search(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(match[1]) * 1024 if match else 0


def _read_children() -> dict[int, str]:
    try:  # most often there is none, and one call tells
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
    except ChildProcessError:
        return {}
    # Not /proc/self/task/*/children: it may miss some while others end (proc(5)).
    children = {}
    own = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            with open(f"/proc/{name}/stat", errors="replace") as file:
                head, _, tail = file.read().rpartition(") ")
            state, parent, *_ = tail.split()
            if int(parent) == own:
                children[int(name)] = f"{head.partition('(')[2]}, state {state}"
    return children


def _read_shm() -> frozenset[str]:
    """Names of this user, but for multiprocessing's semaphores: a tracker removes those later."""
    found = set()
    for path in _entries(_SHM):
        if path.name.startswith("sem.mp-"):
            continue
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.geteuid():
                found.add(path.name)
    return frozenset(found)


def _read_sockets() -> frozenset[str]:
    folder = os.environ.get("MEMDESC_RUNTIME_DIR")
    found = set()
    for path in _entries(Path(folder)) if folder else []:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                found.add(str(path))
    return frozenset(found)


def find_leaks(before: Resources, after: Resources) -> list[Leak]:
    """List what `after` has and `before` had not, without what lasts by design.

    That is: multiprocessing's helper processes, its resource sharer, the one I/O thread of a
    process with connections, and the sockets by which descriptors go through multiprocessing, each
    with the descriptors that belong to it. What is on its way, and nobody took, is a leak.
    """
    leaks = [
        Leak(LeakKind.FD, f"{fd}: {target}") for fd, target in _fds_left(before, after).items()
    ]
    for name, length in after.mappings.items():
        added = length - before.mappings.get(name, 0)
        if added > 0:
            leaks.append(Leak(LeakKind.MAPPING, f"{added:,} bytes of {name}"))
    if after.locked > before.locked:
        leaks.append(Leak(LeakKind.LOCKED, f"{after.locked - before.locked:,} bytes"))
    lasting = {_IO_THREAD, _sharer_thread()}
    for ident, name in after.threads.items():
        if ident not in before.threads and name not in lasting:
            leaks.append(Leak(LeakKind.THREAD, name))
    for pid, text in after.children.items():
        if pid not in before.children and not _lasts(pid):
            leaks.append(Leak(LeakKind.CHILD, f"{pid}: {text}"))
    for name in sorted(after.shm - before.shm):
        if not _held_by_others(_SHM / name):
            leaks.append(Leak(LeakKind.SHM, f"{_SHM / name}"))
    leaks += [Leak(LeakKind.SOCKET, path) for path in sorted(after.sockets - before.sockets)]
    return leaks


def _fds_left(before: Resources, after: Resources) -> dict[int, str]:
    lasting = _multiprocessing_fds()
    left = {
        fd: target
        for fd, target in after.fds.items()
        if before.fds.get(fd) != target and fd not in lasting
    }
    if _IO_THREAD in after.threads.values() and _IO_THREAD not in before.threads.values():
        for kind in _IO_THREAD_FDS:
            lasting_fd = next((fd for fd, target in left.items() if target == kind), None)
            if lasting_fd is not None:
                del left[lasting_fd]
    return left


def _multiprocessing_fds() -> set[int]:
    """Find the descriptors by which this process holds multiprocessing's helpers."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    forkserver = sys.modules.get("multiprocessing.forkserver")
    sharer = sys.modules.get("multiprocessing.resource_sharer")
    fds = {
        getattr(getattr(tracker, "_resource_tracker", None), "_fd", None),
        getattr(getattr(forkserver, "_forkserver", None), "_forkserver_alive_fd", None),
    }
    listener = getattr(getattr(sharer, "_resource_sharer", None), "_listener", None)
    if listener is not None:
        fds.add(listener._listener._socket.fileno())
    transit = sys.modules.get("memdesc.handover.transit")
    if transit is not None:
        fds |= transit.ways.fds()
    return {fd for fd in fds if fd is not None}


def _sharer_thread() -> str | None:
    sharer = sys.modules.get("multiprocessing.resource_sharer")
    thread = getattr(getattr(sharer, "_resource_sharer", None), "_thread", None)
    return getattr(thread, "name", None)


def _lasts(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True  # ended and waited for, since it was listed
    return any(helper in command for helper in _LASTING_CHILDREN)


def _held_by_others(path: Path) -> bool:
    """Whether a process that is neither this one nor its child has the file open or mapped.

    Names in /dev/shm do not say whose they are; what another living process still uses is
    that one's (a test that runs beside this one, for instance). Told by device and inode: the
    C library links a semaphore under a second name.
    """
    try:
        file = path.stat()
    except FileNotFoundError:
        return True  # gone by now
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    mapped = re.compile(rf" {device} {file.st_ino} ")
    ours = {os.getpid(), *_read_children()}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in ours:
            continue
        # Ended, or another user's: then it is not of this run.
        with suppress(OSError, MemdescError), Task(int(name)) as task:
            if mapped.search(os.fsdecode(task.read_proc("maps", f"look at task {name}"))):
                return True
            if any(_is_same(fd, file) for fd in Path(f"/proc/{name}/fd").iterdir()):
                return True
    return False


def _is_same(fd: Path, file: os.stat_result) -> bool:
    try:
        device, inode, *_ = _core.stat_cached(-1, os.fsencode(fd))
    except FileNotFoundError:  # closed since it was listed
        return False
    return (device, inode) == (file.st_dev, file.st_ino)


@contextmanager
def leak_guard(*, allow: Collection[LeakKind] = (), settle: float = 1.0) -> Iterator[None]:
    """Raise `LeakError` if the block leaves anything behind in this process.

    Parameters
    ----------
    allow : collection of LeakKind
        What the block leaves on purpose.
    settle : float
        Seconds to wait for what ends a little later (a closed peer, an ended thread). Waited
        only where something is left at first; the collector is then run too.

    Raises
    ------
    LeakError
        With one line for each descriptor, shared mapping, locked amount, thread, child,
        name in /dev/shm or socket in `$MEMDESC_RUNTIME_DIR` that is new.

    Examples
    --------
    >>> with leak_guard(settle=0.1):
    ...     ends = os.pipe()
    Traceback (most recent call last):
    memdesc.testing.leaks.LeakError: 2 left behind:...
    >>> for end in ends:
    ...     os.close(end)
    """
    before = Resources.now()
    yield
    deadline = time.monotonic() + settle
    leaks = _leaks_since(before, allow)
    while leaks:
        gc.collect()
        leaks = _leaks_since(before, allow)
        if leaks and time.monotonic() >= deadline:
            raise LeakError(leaks)
        if leaks:
            time.sleep(0.01)


def _leaks_since(before: Resources, allow: Collection[LeakKind]) -> list[Leak]:
    return [leak for leak in find_leaks(before, Resources.now()) if leak.kind not in allow]
