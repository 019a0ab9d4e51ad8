"""VM objects, and those that this process made: sealed memfds.

A `MemoryObject` is a file descriptor with what is known and enforced about it. It owns the
descriptor. It maps nothing: `memdesc.mapping` does.

Linux: memfd_create, ftruncate, fchmod, fcntl(F_ADD_SEALS), fallocate; /proc/self/fd to open a
descriptor again. None of it needs a privilege; MFD_HUGETLB needs pages in the pool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from memdesc import _core
from memdesc.errors import (
    AllocationError,
    ClosedError,
    InvalidArgument,
    UnsupportedError,
    describe_errno,
)
from memdesc.memory.lease import held_by_others
from memdesc.memory.lifecycle import TABLE, Lifecycle, State
from memdesc.memory.page_kinds import PageKind
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access

_HUGE_PAGES = "/sys/kernel/mm/hugepages"
_PUNCH_HOLE = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (linux/falloc.h)."""


class MemoryObject(Protocol):
    """What mapping and handing over need to know of a VM object."""

    @property
    def size(self) -> int:
        """Bytes of the file: no mapping may reach past it."""

    @property
    def page_size(self) -> int:
        """What offsets and lengths of mappings are multiples of."""

    @property
    def max_access(self) -> Access:
        """The most that a mapping made through `open` gives."""

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: what the maps file of any task shows of it."""

    @property
    def enforced(self) -> bool:
        """Whether seals hold `max_access`, or courtesy alone."""

    @property
    def immutable(self) -> bool:
        """Whether it is sealed against all writing."""

    def open(self, access: Access) -> int:
        """Give a descriptor for a mapping in this task; the caller closes it."""

    def grant(self, access: Access, *, enforced: bool, user: int) -> int:
        """Give a descriptor to be sent to another task; the caller closes it."""

    def check_grant(self, access: Access, *, enforced: bool) -> None:
        """Raise what `grant` would, or each task that was given it; nothing is granted."""

    def close(self) -> None:
        """Let go of the descriptor; mappings keep the pages."""


_objects: weakref.WeakValueDictionary[tuple[int, int], OwnedObject] = weakref.WeakValueDictionary()

_held: set[OwnedObject] = set()


def find_owned(identity: tuple[int, int]) -> OwnedObject | None:
    """Find the open memory object of this process that has that device and inode.

    Who asks means to make the memory visible once more. A retired object is not found, and what
    it kept is not recycled: a mapping made over the views that are left may escape the lease.
    """
    object_ = _objects.get(identity)
    if object_ is not None and object_.abandon():
        del _objects[identity]
        return None
    return object_


@functools.cache
def anonymous_device() -> int:
    """Tell the device number of the kernel's own shmem mount, which no path leads to.

    Memfds and shared anonymous memory live there, and nothing that a user can name.
    """
    fd = os.memfd_create("memdesc-device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


@functools.cache
def memory_devices() -> frozenset[int]:
    """Tell the device numbers of the kernel's own mounts of shmem and of each size of huge pages.

    What lies there is memory and nothing else: no other process serves it.
    """
    found = {anonymous_device()}
    for name in os.listdir(_HUGE_PAGES) if os.path.isdir(_HUGE_PAGES) else ():
        size = int(name.removeprefix("hugepages-").removesuffix("kB")) << 10
        flags = os.MFD_HUGETLB | (size.bit_length() - 1) << os.MFD_HUGE_SHIFT
        with contextlib.suppress(OSError):  # then nobody has any of that size
            fd = os.memfd_create("memdesc-device", flags | os.MFD_CLOEXEC)
            found.add(os.fstat(fd).st_dev)
            os.close(fd)
    return frozenset(found)


def reopen(fd: int, access: Access) -> int:
    """Open what a descriptor refers to once more, with an open file description of its own.

    A duplicate would share the description: then no lease could tell the holders apart, and a
    read-only duplicate of a writable descriptor does not exist. Never waits: where somebody holds
    a lease on the file, it fails with EAGAIN instead (the kernel would wait 45 s for him).
    """
    flags = os.O_RDWR if access.writable else os.O_RDONLY
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"descriptor {fd} can not be opened again through /proc/self/fd: mount /proc here",
            errno=error.errno,
        ) from error


class OwnedObject:
    """A memfd that this process made, with its seals and its lifecycle.

    Parameters
    ----------
    name : str
        Shows in every task's maps as ``/memfd:name``; at most 249 bytes, without NUL.
    size : int
        Bytes; a multiple of the page size of `pages`.
    pages : PageKind
        HUGE makes it of the huge-page pool; all others of shmem.
    max_access : Access
        What others get at most.
    """

    def __init__(self, name: str, size: int, *, pages: PageKind, max_access: Access) -> None:
        self._begin(name, size, pages, Lifecycle(max_access))
        self._fd = _create(name, size, pages)
        try:
            status = os.fstat(self._fd)
            self.identity = (status.st_dev, status.st_ino)
        except BaseException:
            self.close()
            raise
        _objects[self.identity] = self

    def _begin(self, name: str, size: int, pages: PageKind, lifecycle: Lifecycle) -> None:
        self.name = name
        self.size = size
        self.pages = pages
        self.page_size = pages.page_size
        self.lifecycle = lifecycle
        self._fd = self._remains = -1
        self._frozen: OwnedObject | None = None
        self._attach: Callable[[], None] | None = None
        self._lock = lock_for(self)

    def _sibling(self, lifecycle: Lifecycle) -> OwnedObject:
        """Make another object for the same memory, which has no descriptor yet."""
        other = OwnedObject.__new__(OwnedObject)
        other._begin(self.name, self.size, self.pages, lifecycle)
        other.identity = self.identity
        return other

    @property
    def max_access(self) -> Access:
        """What others get at most."""
        return self.lifecycle.max_access

    @property
    def enforced(self) -> bool:
        """Always: the seals are put on before the first descriptor leaves this process."""
        return True

    def fileno(self) -> int:
        """Give the owner's own descriptor; `ClosedError` once it is closed.

        No lease tells a duplicate of it from the owner: asking for it marks the memory *exposed*.
        """
        with self._lock:
            fd = self.own_fd()
            self.lifecycle.exposed = True
            return fd

    def own_fd(self) -> int:
        """As `fileno`, for the library itself: it duplicates it for no one, so there is no mark.

        What is mapped through it shares the owner's description, and a lease is blind to it: for
        the owner's one view only.
        """
        if self._attach is not None:
            self._attach()
        if self._fd < 0:
            raise ClosedError(f"the memory of buffer {self.name!r} was closed")
        return self._fd

    def reserve(self, offset: int, length: int) -> None:
        """Take the pages of a range now (fallocate), or raise OSError."""
        with self._lock:
            _core.fallocate(self.own_fd(), 0, offset, length)

    def give_back(self, offset: int, length: int) -> None:
        """Let the pages of a range go; after a read-only grant the seals keep them."""
        with self._lock, contextlib.suppress(OSError):
            _core.fallocate(self.own_fd(), _PUNCH_HOLE, offset, length)

    def seals(self) -> int:
        """Read the seals that the kernel holds now (F_SEAL_* bits)."""
        if self._frozen is not None:
            return self._frozen.seals()
        return fcntl.fcntl(self.own_fd(), fcntl.F_GET_SEALS)

    def open(self, access: Access) -> int:
        """Give a descriptor for a further mapping in the owner's own task: an opening of its own.

        A lease sees it. A writable one can be mapped only before `FUTURE_WRITE` is on.
        """
        with self._lock:  # a close() meanwhile would give the number to some other file
            return reopen(self.own_fd(), access)

    def grant(self, access: Access, *, enforced: bool = True, user: int) -> int:
        """Re-open for another task of user id `user`, sealed as the lifecycle says."""
        with self._lock:
            own_fd = self.own_fd()
            life = self.lifecycle
            state, seals = life.grant(access, enforced=enforced, name=self.name)
            fd = reopen(own_fd, access)  # may fail: before the seals, which stay
            try:
                self._seal(seals)
            except BaseException:
                os.close(fd)
                raise
            life.granted(state, user)
        return fd

    def check_grant(self, access: Access, *, enforced: bool = True) -> None:
        """Raise what `grant` would; nothing is sealed."""
        with self._lock:
            life = self.lifecycle
            if life.state is not State.DETACHED:  # it is moved first
                life.grant(access, enforced=enforced, name=self.name)

    def _seal(self, seals: int) -> None:
        missing = seals & ~self.seals()
        if not missing:
            return
        try:
            fcntl.fcntl(self.own_fd(), fcntl.F_ADD_SEALS, missing)
        except PermissionError:
            if seals & ~self.seals():  # else a fork child, or its parent, was first
                raise

    def close(self) -> None:
        """Let go of the descriptor. Mappings and other holders keep the pages."""
        self._frozen = self._attach = None
        close_object(self)

    # -- snapshots: see memdesc.descriptors.copy_on_write ----------------------------------------

    @property
    def lock(self) -> Any:
        """Held while the object is granted, detached or moved; reentrant."""
        return self._lock

    @property
    def immutable(self) -> bool:
        """Whether it is sealed against all writing."""
        return self.lifecycle.state is State.FROZEN

    @property
    def frozen(self) -> OwnedObject | None:
        """Of a detached object: that of the snapshot, which the owner's view is over."""
        return self._frozen

    def split(self, attach: Callable[[], None]) -> OwnedObject:
        """Give the memory to a snapshot: an object that has its descriptor, and is to be frozen.

        This one is detached from here on: who needs its descriptor has `attach` called first,
        which brings it new memory by `adopt`.
        """
        frozen = self._sibling(Lifecycle(Access.READ_ONLY))
        with self._lock:
            frozen._fd, self._fd = self._fd, -1
            self._frozen, self._attach = frozen, attach
            self.lifecycle.detach()
            _objects[self.identity] = frozen
        return frozen

    def rejoin(self) -> None:
        """Undo `split`: the owner's view was not replaced after all."""
        with self._lock:
            lifecycle, frozen = self.lifecycle, self._frozen
            assert frozen is not None
            self.adopt(frozen)
            self.lifecycle = lifecycle
            lifecycle.rejoin()

    def adopt(self, other: OwnedObject) -> None:
        """Take over the memory of another object, which is closed by that.

        It may be larger; the size stays that of the owner's view.
        """
        with self._lock, other._lock:
            self.pages, self.page_size = other.pages, other.page_size
            self.identity, self.lifecycle = other.identity, other.lifecycle
            self._frozen = self._attach = None
            self._fd, other._fd = other._fd, -1
            _objects[self.identity] = self

    def doubt(self, frozen: OwnedObject | None = None) -> None:
        """Forget the snapshot's object while the owner's view is replaced, or name it again."""
        self._frozen = frozen

    def freeze(self) -> None:
        """Seal it against all writing, for ever.

        Raises
        ------
        OSError
            EBUSY: somebody has it mapped writable, or holds pages of it pinned.
        """
        with self._lock:
            self._seal(TABLE[State.FROZEN].seals)
            self.lifecycle.freeze()

    # -- what the recycler keeps -----------------------------------------------------------------

    def hold(self) -> None:
        """Keep it alive for its allocation.

        In garbage that holds both, the collector would else end the object first, and nothing be
        left to recycle.
        """
        _held.add(self)

    def let_go(self) -> None:
        """Undo `hold`."""
        _held.discard(self)

    def retire(self) -> bool:
        """Close it for everyone, but keep the descriptor for a successor. False where closed."""
        with self._lock:
            if self._fd >= 0:
                self._remains, self._fd = self._fd, -1
            return self._remains >= 0

    @property
    def retired(self) -> bool:
        """Whether it is closed, and its descriptor kept."""
        return self._remains >= 0

    def abandon(self) -> bool:
        """Close what a retired object kept. False where it is not one, or had a successor."""
        with self._lock:
            fd, self._remains = self._remains, -1
            if fd >= 0:
                os.close(fd)
            return fd >= 0

    def is_held_by_others(self) -> bool:
        """Ask the kernel whether anything else than the owner's view still has a retired object.

        By a write lease: see `memdesc.memory.lease`. Never waits for a lock: who holds it is just
        about to spoil the object.

        Raises
        ------
        ClosedError
            Nothing is kept of it any more.
        OSError
            There is no telling: no leases on this system, or none for this user.
        """
        with _core.Attempt(self._lock) as free:
            if not free:
                return True
            fd = self._remains
            if fd < 0:
                raise ClosedError(f"the memory of buffer {self.name!r} was let go")
            return held_by_others(fd)

    def successor(self, max_access: Access) -> OwnedObject:
        """Make the object of the next buffer on what a retired one kept; ClosedError if nothing.

        A new object: who still holds this one, which stays closed, does not reach that buffer.
        Never waits for a lock.
        """
        next_ = self._sibling(self.lifecycle.successor(max_access))
        with _core.Attempt(self._lock) as free:
            if not free or self._remains < 0:
                raise ClosedError(f"the memory of buffer {self.name!r} was let go")
            next_._fd, self._remains = self._remains, -1
            _objects[self.identity] = next_
        return next_

    def __del__(self) -> None:
        try:
            self.close()
            self.abandon()
        except BaseException:  # an interrupt: nobody can close it later
            self.close()
            self.abandon()
            raise


class Holder(Protocol):
    """What holds a descriptor as `_fd`, under its `_lock`."""

    _fd: int
    _lock: Any


def close_object(object_: Holder) -> None:
    """Close the descriptor of a memory object, once."""
    with object_._lock:
        fd, object_._fd = object_._fd, -1
        if fd >= 0:
            os.close(fd)


def check_name(name: str) -> str:
    """Give a name back that a memfd can carry, else raise `InvalidArgument`."""
    if not isinstance(name, str):
        raise InvalidArgument(f"name is a {type(name).__name__}: give a str", errno=errno.EINVAL)
    if "\0" in name or len(os.fsencode(name)) > 249:
        raise InvalidArgument(
            f"name {name[:40]!r} has {len(os.fsencode(name))} bytes: a memfd's name has at most "
            "249 and no NUL",
            errno=errno.EINVAL,
        )
    return name


def fitting_name(name: str, ending: str = "") -> str:
    """Give as much of a name as a memfd can carry, with an ending: others may be longer."""
    whole = os.fsencode(name.replace("\0", "?"))
    return whole[: 249 - len(ending)].decode(errors="ignore") + ending


def _create(name: str, size: int, pages: PageKind) -> int:
    """A memfd of that size that can neither grow nor shrink, through a re-open of its own."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if pages is PageKind.HUGE:
        flags |= os.MFD_HUGETLB
    try:
        first = _memfd_create(name, flags)
        try:
            os.fchmod(first, 0o600)  # memfd_create says 0777: another user could re-open it
            os.ftruncate(first, size)
            fcntl.fcntl(first, fcntl.F_ADD_SEALS, _core.F_SEAL_GROW | _core.F_SEAL_SHRINK)
            # The descriptor that memfd_create gives is not counted by leases; a re-open is.
            return reopen(first, Access.READ_WRITE)
        finally:
            os.close(first)
    except OSError as error:
        raise AllocationError(
            f"buffer {name!r} of {size:,} bytes can not be created: {describe_errno(error)} "
            f"({error.strerror}); "
            + (
                "close descriptors or raise `ulimit -n`"
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else "ask for less"
            ),
            errno=error.errno,
            requested=size,
        ) from error


def _memfd_create(name: str, flags: int) -> int:
    """memfd_create, not executable where the kernel knows of that (6.3), else without."""
    try:
        return os.memfd_create(name, flags | _core.MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)
