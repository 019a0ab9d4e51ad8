"""Those who hold a block: what each tells of itself, and whether it is true.

A process that ended, closed the block, or never was it, is found out by what /proc shows of the
descriptor that it told of; nothing there is opened before that, and nothing but a memfd of ours.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from dataclasses import dataclass

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import TaskGoneError
from memdesc.handover import too_many_files
from memdesc.interop.shared_memory.folder import read_record
from memdesc.vm.task import Task

_HOLDER = re.compile(r"([1-9][0-9]{0,9})\.([0-9]{1,20})\.([0-9]{1,9})\.([0-9]+)", re.ASCII)

_CROWD = 16
"""Entries of holders from which on one who joins them looks which are of the dead."""

_serial = itertools.count()


class Holding:
    """One holder of a block: this process, by one descriptor of its own.

    Attributes
    ----------
    own, name, token : str
        The folder of the names, and which block of them.
    made_here : bool
        Whether this process made the block: then it holds it until the name is gone.
    pins : list of MemoryDescriptor
        One for each range of addresses here that shows it: what arrays there are traced to.
    """

    __slots__ = ("_entry", "_fds", "made_here", "name", "own", "pins", "token")

    def __init__(self, own: str, name: str, token: str, fd: int) -> None:
        self.name = name
        self.token = token
        self.own = own
        self._entry: str | None = None
        self.made_here = False
        self.pins: list[MemoryDescriptor] = []
        self._fds = [fd]  # whoever takes it out closes it, also where a collector comes between

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it was let go."""
        return self._fds[0] if self._fds else -1

    @property
    def _block(self) -> str:
        return f"{self.own}/blocks/{self.token}"

    def tell(self) -> bool:
        """Say in the block's folder that this process has it; False where that is no more."""
        entry = f"{self._block}/{os.getpid()}.{_started()}.{self.fd}.{next(_serial)}"
        try:
            os.symlink("held", entry)  # which takes no descriptor, and no space
        except FileNotFoundError:
            return False
        self._entry = entry
        if len(os.listdir(self._block)) > _CROWD:
            anyone(self.own, self.token)
        return True

    def rest(self) -> None:
        """Hold it by a handle (O_PATH), which others can open, and no lease sees.

        So who uses the block last can tell that nobody else does, and free its pages.
        """
        fd, entry = self._fds[0], self._entry
        handle = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        self._fds[0] = handle
        try:
            self.tell()  # before it is no longer told of the other: one must always be found
        except BaseException:
            self._fds[0] = fd
            os.close(handle)
            raise
        if entry is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry)
        os.close(fd)

    def disown(self) -> None:
        """In a fork child: what the parent told of itself is the parent's."""
        self._entry = None

    def inherit(self) -> None:
        """In a fork child: it has the parent's descriptor under the same number, so tell that."""
        self.disown()
        if self._fds:
            with contextlib.suppress(OSError):  # a full disk; then the others answer for it
                self.tell()

    @property
    def named(self) -> bool:
        """Whether the name still leads to this block."""
        record = read_record(self.own, self.name)
        return record is not None and record.token == self.token

    def _untell(self) -> bool:
        """Say no longer that this process has it; whether nobody else says so."""
        entry, self._entry = self._entry, None
        if entry is not None:
            # What can not be removed (the folder is gone, or not ours) /proc shows to be false.
            with contextlib.suppress(OSError):
                os.unlink(entry)
        return self._remove()

    def _remove(self) -> bool:
        """Remove the block's folder, if nobody tells of himself there; whether it is gone."""
        try:
            os.rmdir(self._block)
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def let_go(self) -> None:
        """Hold it no longer. Again is a no-op. Takes no lock: a collector may call it anywhere."""
        try:
            fd = self._fds.pop()
        except IndexError:
            return
        last = self._untell()  # before the number can mean something else
        os.close(fd)
        with contextlib.suppress(OSError):  # it may not be ours to look at
            if not last and not self.named and not anyone(self.own, self.token):
                self._remove()  # nobody looks there by the name: what the dead left goes now

    def leave(self) -> bool:
        """At the end of this process, let go; whether that leaves nobody who holds it.

        The descriptor stays open for views that may be looked at still; the kernel closes it.
        """
        if not self._fds:
            return False
        self._fds.clear()
        return self._untell()


@dataclass(frozen=True, slots=True)
class Holder:
    """What the entry of one holder says."""

    pid: int
    started: int
    fd: int
    entry: str


def holders(own: str, token: str) -> list[Holder]:
    """Who says that he holds a block."""
    try:
        entries = os.listdir(f"{own}/blocks/{token}")
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        said = _HOLDER.fullmatch(entry)
        if said:
            pid, started, fd, _ = map(int, said.groups())
            found.append(Holder(pid, started, fd, f"{own}/blocks/{token}/{entry}"))
    return found


def anyone(own: str, token: str) -> bool:
    """Whether anybody holds a block. The entries of those who do not any more go."""
    alive = False
    for holder in holders(own, token):
        if _is_dead(holder, token):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(holder.entry)
        else:
            alive = True
    return alive


def _is_dead(holder: Holder, token: str) -> bool:
    try:
        return not _shows(os.readlink(f"/proc/{holder.pid}/fd/{holder.fd}"), token)
    except PermissionError:
        return not _still_runs(holder)
    except OSError:  # ENOENT, ESRCH: it ended, or closed it
        return True


def _still_runs(holder: Holder) -> bool:
    """Whether a process that we may not look into is the one that told of itself."""
    try:
        with Task(holder.pid, start_time=holder.started) as task:
            return task.alive
    except TaskGoneError:
        return False


def _shows(shown: str, token: str) -> bool:
    """Whether what /proc shows of a descriptor is the block's memfd."""
    return shown.startswith("/memfd:") and shown.endswith(f".{token} (deleted)")


def open_holder(holder: Holder, token: str, flags: int, refusals: list[int]) -> int:
    """Open what a holder has: a descriptor, or -1. Nothing is opened but a memfd of ours."""
    try:
        # A handle opens nothing yet, and is of the same file whatever the number means by then.
        handle = os.open(f"/proc/{holder.pid}/fd/{holder.fd}", os.O_PATH | os.O_CLOEXEC)
        try:
            link = f"/proc/self/fd/{handle}"
            return os.open(link, flags) if _shows(os.readlink(link), token) else -1
        finally:
            os.close(handle)
    except PermissionError:
        if _still_runs(holder):
            refusals.append(holder.pid)
        return -1
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise too_many_files(error) from error
        return -1


_me = (0, 0)


def _started() -> int:
    """When this process started, as /proc tells of it: with its pid, it is no other."""
    global _me
    pid = os.getpid()
    if _me[0] != pid:
        with Task.current() as task:
            _me = (pid, task.start_time)
    return _me[1]
