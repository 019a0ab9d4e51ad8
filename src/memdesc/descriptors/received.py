"""ReceivedMemoryDescriptor: memory that a peer gave."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import SealedError, describe_errno
from memdesc.mapping import Extent, check_range, part_of
from memdesc.memory.foreign import ForeignObject
from memdesc.vm.pages import Access, Direction
from memdesc.wiring import wire


@final
class ReceivedMemoryDescriptor(MemoryDescriptor):
    """Describes memory of another task, by descriptors of its VM objects.

    Made by `Connection.descriptor`, `receive_descriptor` and by unpickling in `multiprocessing`.
    Everything about it was checked on arrival: sizes by fstat, seals by fcntl. It can be passed
    on with at most the rights that came with it.

    Attributes
    ----------
    enforced : bool
        Whether the kernel holds `max_access`, or the giver's word alone.

    Notes
    -----
    Writing goes by pwrite, never through a mapping: whoever else may write the memory could take
    a page away under a store.
    """

    def __init__(self, extents: Sequence[Extent], *, direction: Direction, name: str) -> None:
        super().__init__(direction, name)
        self._parts = tuple(extents)
        self._length = sum(extent.length for extent in extents)
        self._max_access = min(
            (extent.object.max_access for extent in extents), key=lambda access: access.writable
        )
        self._window: _core.Window | memoryview | None = None

    @property
    def length(self) -> int:
        """Bytes described."""
        return self._length

    @property
    def max_access(self) -> Access:
        """The least that the objects allow."""
        return self._max_access

    @property
    def enforced(self) -> bool:
        """Whether the kernel holds `max_access` on every object."""
        return all(extent.object.enforced for extent in self._parts)

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        return part_of(self._parts, offset, length)

    def _export(self) -> _core.Window | memoryview:
        self._check_open()
        with self._lock:
            if self._window is None:
                self._window = self.map()._export()
            return self._window

    def _is_sealed(self) -> bool:
        return not self.max_access.writable

    def _store(self, offset: int, source: memoryview) -> None:
        done = 0
        for extent in self._extents(offset, source.nbytes, Access.READ_WRITE):
            fd = extent.object.open(Access.READ_WRITE)
            try:
                at = 0
                while at < extent.length:
                    piece = source[done + at : done + extent.length]
                    at += os.pwrite(fd, piece, extent.offset + at)
            except PermissionError as error:
                raise SealedError(
                    f"{self.name!r} was given for writing, and sealed since: "
                    f"{describe_errno(error)}; {done + at:,} of {source.nbytes:,} bytes written",
                    errno=error.errno,
                ) from error
            finally:
                os.close(fd)
            done += extent.length

    def read_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out by pread, or from the view where there is one already."""
        self._check_open()
        offset, length = check_range(offset, length, self._length, "the descriptor")
        if self._window is not None:
            return super().read_bytes(offset, length)
        return b"".join(
            _read_at(extent) for extent in self._extents(offset, length, Access.READ_ONLY)
        )

    def _wire(self, direction: Direction) -> Callable[[], None]:
        window = self._export()
        return wire(_core.buffer_address(window)[0], self._length, keep=window).release

    def _close(self) -> None:
        self._window = None
        for extent in self._parts:
            if isinstance(extent.object, ForeignObject):
                extent.object.close()


def _read_at(extent: Extent) -> bytes:
    """Read an extent whole; a hole reads as zeros, so a short count can only be a signal's."""
    fd = extent.object.open(Access.READ_ONLY)
    try:
        pieces, at = [], 0
        while at < extent.length:
            piece = os.pread(fd, extent.length - at, extent.offset + at)
            if not piece:
                raise OSError(errno.EIO, "pread: the object ended early")
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
