"""A file opened for a device: past the page cache where it can be, and through it for the rest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from memdesc import _core
from memdesc.errors import ClosedError, InvalidArgument, describe_errno
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import page_size

_MODES = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


class OpenedFile:
    """Two descriptors of one file: `direct`, which O_DIRECT is set on, and `buffered`.

    Parameters
    ----------
    path : str
    mode : str
        "r", "r+" (there is one already), "w" (emptied, or made), "x" (made).

    Attributes
    ----------
    direct : int
        -1 where the file takes no O_DIRECT; `why_buffered` then says why.
    may_block : bool
        Whether submitting a request may wait for its end: no file system of a device.
    memory_alignment, offset_alignment : int
        Bytes, for what goes by `direct`. Page size where the kernel does not say (before 6.1).
    """

    def __init__(self, path: str, mode: str) -> None:
        self.buffered = self.direct = -1
        self.why_buffered = ""
        self.may_block = False
        self._users = 0
        self._closing = False
        self._lock = lock_for(self)
        if mode not in _MODES:
            raise InvalidArgument(
                f"mode is {mode!r}: give one of {', '.join(_MODES)}", errno=errno.EINVAL
            )
        self.path = path
        self.writable = mode != "r"
        # Not to wait for the other end of what turns out to be a pipe.
        self.buffered = os.open(path, _MODES[mode] | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            kind = os.fstat(self.buffered).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise InvalidArgument(
                    f"{path!r} is neither a file nor a block device (type {stat.S_IFMT(kind):o}): "
                    "it has no offsets to read at",
                    errno=errno.EINVAL,
                )
            flags = fcntl.fcntl(self.buffered, fcntl.F_GETFL)
            fcntl.fcntl(self.buffered, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
            self._open_direct()
        except BaseException:
            self._let_go()
            raise

    def _open_direct(self) -> None:
        alignment = _core.dio_alignment(self.buffered)
        self.memory_alignment, self.offset_alignment = alignment or (page_size, page_size)
        if alignment and not alignment[1]:
            self.why_buffered = "its file system takes no O_DIRECT on it"
            return
        # FUSE waits for its server wherever it is called, NFS for the network.
        self.may_block = alignment is None and not os.major(os.fstat(self.buffered).st_dev)
        access = os.O_RDWR if self.writable else os.O_RDONLY
        try:
            # The same file for certain, whatever lies at its path by now.
            self.direct = os.open(
                f"/proc/self/fd/{self.buffered}", access | os.O_DIRECT | os.O_CLOEXEC
            )
        except OSError as error:
            self.why_buffered = f"opening it with O_DIRECT: {describe_errno(error)}"

    def size(self) -> int:
        """Tell its size now, in bytes."""
        status = os.fstat(self.buffered)
        if stat.S_ISBLK(status.st_mode):
            return os.lseek(self.buffered, 0, os.SEEK_END)
        return status.st_size

    def sync(self) -> None:
        """Have what was written reach the device (fdatasync)."""
        os.fdatasync(self.buffered)

    def use(self) -> None:
        """Keep it open until `done`; `ClosedError` where it is closed already."""
        with self._lock:
            if self._closing:
                raise ClosedError(f"{self.path!r} was closed, or belongs to the parent process")
            self._users += 1

    def done(self) -> None:
        """Undo one `use`."""
        with self._lock:
            self._users -= 1
            if self._closing and not self._users:
                self._let_go()

    @property
    def closed(self) -> bool:
        """Whether no more use is to be made of it."""
        return self._closing

    def close(self) -> None:
        """Close it when the last user is done."""
        with self._lock:
            self._closing = True
            if not self._users:
                self._let_go()

    def forked(self) -> None:
        """In a fork child: let go of it at once."""
        self._closing = True
        self._let_go()

    def _let_go(self) -> None:
        direct, self.direct = self.direct, -1
        buffered, self.buffered = self.buffered, -1
        for fd in (direct, buffered):
            if fd >= 0:
                # The server of a network's file is gone: what was not synced was never promised.
                with contextlib.suppress(OSError):
                    os.close(fd)

    def __del__(self) -> None:
        self._let_go()
