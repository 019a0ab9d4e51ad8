"""VM objects of somebody else: received from a peer, or found in another task.

Everything about them is checked when they come: what a stranger could still do to them, a mapping
would suffer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from memdesc import _core
from memdesc.errors import ClosedError, MappingError, MappingReason
from memdesc.memory.closing import discard
from memdesc.memory.memfd import close_object, reopen
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access, page_size


class ForeignObject:
    """A VM object of somebody else, with a descriptor of ours to it.

    Parameters
    ----------
    fd : int
        Taken over. Its open mode bounds what can be done.
    max_access : Access
        What the giver, or the region in the other task, allows.
    trust_size : bool
        Accept an object whose owner may truncate it, or take its pages away: a later access to
        such pages kills this process with SIGBUS.
    user : int, optional
        Who gave it, and answers for how long closing it takes; by default this process's.

    Raises
    ------
    MappingError
        CAN_SHRINK: not sealed against it (EPERM). ACCESS: the descriptor can not be mapped.
    """

    _fd = -1

    def __init__(
        self,
        fd: int,
        max_access: Access,
        *,
        trust_size: bool = False,
        user: int | None = None,
    ) -> None:
        self._fd = fd
        try:
            self._lock = lock_for(self)
            mode = fcntl.fcntl(fd, fcntl.F_GETFL)
            _check_readable(mode)
            self._seals = _seals_of(fd)
            if self._seals < 0 and not trust_size:
                raise self._can_shrink("is not a memfd")  # fstat could hang: on FUSE, its server
            status = os.fstat(fd)
            self.size = status.st_size
            self.identity = (status.st_dev, status.st_ino)
            if not stat.S_ISREG(status.st_mode):
                raise MappingError(
                    f"descriptor {fd} is not a memory object (file type "
                    f"{stat.S_IFMT(status.st_mode):o}): give one made by memfd_create",
                    reason=MappingReason.ACCESS,
                    errno=errno.EACCES,
                )
            # Of shmem it is a base page, of hugetlb that file's own page, of whatever size.
            self.page_size = page_size if self._seals < 0 else os.fstatvfs(fd).f_bsize
            self._writable = mode & os.O_ACCMODE == os.O_RDWR
            self.max_access = self._most(max_access)
            if not trust_size:
                self._check_size_is_sealed()
        except BaseException:
            self._fd = -1
            discard([fd], os.geteuid() if user is None else user)
            raise

    def _most(self, claimed: Access) -> Access:
        """What can be had: the least of the descriptor's mode, its seals and the giver's word."""
        if not self._writable or self._sealed_against_writing():
            return Access.READ_ONLY
        return claimed

    def _sealed_against_writing(self) -> bool:
        return self._seals > 0 and bool(
            self._seals & (_core.F_SEAL_WRITE | _core.F_SEAL_FUTURE_WRITE)
        )

    def _check_size_is_sealed(self) -> None:
        if not self._seals & _core.F_SEAL_SHRINK:
            raise self._can_shrink(f"has the seals {self._seals:#x}")
        if self.page_size != page_size and not self._sealed_against_writing():
            raise MappingError(
                "the object is of huge pages and writable: whoever may write it can punch a page "
                "out, and the next access would kill this process with SIGBUS; huge memory is "
                "shared read-only",
                reason=MappingReason.CAN_SHRINK,
                errno=errno.EPERM,
            )

    def _can_shrink(self, have: str) -> MappingError:
        return MappingError(
            f"the object {have}: without F_SEAL_SHRINK its owner could truncate it, and the next "
            "access would kill this process with SIGBUS; have it sealed, or say trust_size=True "
            "if its owner is trusted",
            reason=MappingReason.CAN_SHRINK,
            errno=errno.EPERM,
        )

    @property
    def enforced(self) -> bool:
        """Whether a seal holds it read-only (a writable object is what it says)."""
        return self.max_access is Access.READ_WRITE or self._sealed_against_writing()

    @property
    def immutable(self) -> bool:
        """Whether nobody can write it any more, its owner neither. A seal is never taken off."""
        return self._seals > 0 and bool(self._seals & _core.F_SEAL_WRITE)

    def fileno(self) -> int:
        """Give our descriptor; `ClosedError` once it is closed."""
        if self._fd < 0:
            raise ClosedError("the received memory was closed")
        return self._fd

    def open(self, access: Access) -> int:
        """Duplicate what we were given; re-open only to give less than it allows."""
        if access.writable and self.max_access is Access.READ_ONLY:
            raise MappingError(
                "the memory was given read-only: ask its owner for max_access=READ_WRITE",
                reason=MappingReason.ACCESS,
                errno=errno.EACCES,
            )
        with self._lock:  # a close() meanwhile would give the number to some other file
            if access.writable is self._writable:
                return os.dup(self.fileno())
            try:
                return reopen(self.fileno(), access)
            except (PermissionError, BlockingIOError):
                return os.dup(self.fileno())  # another user's, mode 0600; or he has a lease on it

    def grant(self, access: Access, *, enforced: bool = True, user: int) -> int:
        """Pass it on with at most the rights that we have."""
        self._check_enforced(access, enforced=enforced)
        return self.open(access)

    def check_grant(self, access: Access, *, enforced: bool = True) -> None:
        """Raise what `grant` would, or any task that it is given to: none trusts its size."""
        self._check_enforced(access, enforced=enforced)
        if self._seals < 0:
            raise self._can_shrink("is not a memfd")
        self._check_size_is_sealed()

    def _check_enforced(self, access: Access, *, enforced: bool) -> None:
        if access is Access.READ_ONLY and enforced and not self._sealed_against_writing():
            raise MappingError(
                "the memory is writable for whoever holds it, so it can not be passed on "
                "read-only: say enforced=False if a courtesy is enough",
                reason=MappingReason.NOT_ENFORCED,
                errno=errno.EPERM,
            )

    def close(self) -> None:
        """Let go of our descriptor. Mappings keep the pages."""
        if self._fd >= 0:  # else there may be no lock either: an interrupt came first
            close_object(self)

    def __del__(self) -> None:
        self.close()


def _check_readable(mode: int) -> None:
    if mode & os.O_PATH or mode & os.O_ACCMODE == os.O_WRONLY:
        raise MappingError(
            "the descriptor was not opened for reading, so it can not be mapped: open it "
            "read-only or read-write",
            reason=MappingReason.ACCESS,
            errno=errno.EACCES,
        )


def _seals_of(fd: int) -> int:
    """The seals of a descriptor; -1 where it is not of a memory file system (EINVAL)."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return -1
        raise
