"""The files that arrays come from: opened, known again, and read exactly."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from memdesc.errors import InvalidArgument, TransferError

_TICK = 0.02
"""Seconds in which a file may be written twice and show one time of change: a tick of the kernel's
clock, with room."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file, and what to make of it.

    Parameters
    ----------
    path : path-like
        A regular file. Its suffix tells the format: .npy, .npz, .safetensors, .arrow, .arrows,
        .feather; any other is raw.
    name : str, optional
        Of its array: the file's name without the suffix by default. The arrays of a file that has
        several keep their names; with `name` each is called ``name.array``.
    dtype : str, optional
        Of a raw file: NumPy's string or name for it; bytes by default.
    shape : tuple of int, optional
        Of a raw file; by default one dimension, as long as the file.
    """

    path: Path
    name: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if self.shape is not None and self.dtype is None:
            raise InvalidArgument(
                f"{self.path} has a shape {self.shape} but no dtype: give both",
                errno=errno.EINVAL,
            )


Files = str | os.PathLike[str] | FileSource | Iterable[str | os.PathLike[str] | FileSource]


def as_sources(files: Files) -> tuple[FileSource, ...]:
    """Give what was named as sources, at least one."""
    if isinstance(files, str | os.PathLike | FileSource):
        files = [files]
    sources = tuple(one if isinstance(one, FileSource) else FileSource(Path(one)) for one in files)
    if not sources:
        raise InvalidArgument("no file was named: give at least one", errno=errno.EINVAL)
    return sources


class Identity(NamedTuple):
    """What tells a file, as it is now, from any other and from itself as it was."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take it from a status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def identify(path: Path) -> Identity | None:
    """Tell what lies at a path now; None where nothing that can be reached does."""
    try:
        return Identity.of(path.stat())
    except OSError:
        return None


class OpenFile:
    """A file to be loaded, open, as it was when it was opened.

    Raises
    ------
    OSError
        As `open` raises: FileNotFoundError, PermissionError, …
    InvalidArgument
        It is no regular file (EISDIR, EINVAL).
    """

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.path = source.path
        # Not to wait for the other end of what turns out to be a pipe.
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self.fd)
            kind = status.st_mode
            if stat.S_ISDIR(kind):
                raise InvalidArgument(
                    f"{self.path} is a directory: name the files in it", errno=errno.EISDIR
                )
            if not stat.S_ISREG(kind):
                raise InvalidArgument(
                    f"{self.path} is no regular file: name regular files", errno=errno.EINVAL
                )
            if not status.st_size:
                raise InvalidArgument(f"{self.path} is empty", errno=errno.ENODATA)
            if abs(time.time() - status.st_mtime) < _TICK:
                time.sleep(_TICK)  # or a store of this very moment would not show
                status = os.fstat(self.fd)
        except BaseException:
            self.close()
            raise
        self.identity = Identity.of(status)

    @property
    def size(self) -> int:
        """Bytes, as they were when it was opened."""
        return self.identity.size

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        """Read a part of the file that must be there: `what` it is."""
        if offset > self.size or nbytes > self.size - offset:
            raise self.wrong(f"{what} of {nbytes:,} bytes does not fit", offset)
        pieces: list[bytes] = []
        while nbytes:
            try:
                piece = os.pread(self.fd, nbytes, offset)
            except OSError as error:
                raise TransferError(
                    f"reading {nbytes:,} bytes at offset {offset:,} of {self.path}: "
                    f"{error.strerror}",
                    errno=error.errno,
                    expected=nbytes,
                    file_offset=offset,
                ) from error
            if not piece:
                raise self.changed()
            pieces.append(piece)
            offset += len(piece)
            nbytes -= len(piece)
        return b"".join(pieces)

    def wrong(self, what: str, offset: int) -> InvalidArgument:
        """Make the error that says what of its contents can not be."""
        return InvalidArgument(
            f"{self.path} ({self.size:,} bytes), offset {offset:,}: {what}", errno=errno.EBADMSG
        )

    def changed(self) -> TransferError:
        """Make the error that says that it is no longer what it was."""
        now = identify(self.path)
        how = "it is gone" if now is None else f"it had {self.size:,} bytes, now {now.size:,}"
        return TransferError(
            f"{self.path} was changed or replaced while it was being read ({how}): nothing of it "
            "is used; load it when it is whole (write a new file, then rename it)",
            errno=errno.ESTALE,
            expected=self.size,
        )

    def check_unchanged(self) -> None:
        """Raise `TransferError` (ESTALE) unless the path still shows the same file, unchanged."""
        if identify(self.path) != self.identity:
            raise self.changed()

    def close(self) -> None:
        """Close it; again is a no-op."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
