"""SnapshotMemoryDescriptor: bytes as they were when it was taken."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, _nothing
from memdesc.descriptors.homes import note_home
from memdesc.errors import SealedError, WiringError, WiringReason
from memdesc.mapping import Extent, map_extents, part_of
from memdesc.vm.pages import Access, Direction, page_size
from memdesc.wiring import wire

if TYPE_CHECKING:
    from memdesc.descriptors.copy_on_write import SnapshotReason
    from memdesc.descriptors.freezing import Frozen


@final
class SnapshotMemoryDescriptor(MemoryDescriptor):
    """Describes bytes that no one can change any more; made by `MemoryDescriptor.snapshot`.

    Its memory is sealed against all writing, for root too, from the moment on that it exists. It
    can be mapped, shared, sent and wired like any other, by anyone read-only. It keeps its memory
    alive by itself: closing the source, or other snapshots of it, is no matter to it.

    Attributes
    ----------
    copied_bytes : int
        How many bytes were copied to take it: 0 where source and snapshot share all pages until
        the source is stored to, and for a snapshot of a snapshot.
    reason : SnapshotReason or None
        Why they were; None where none was.
    extent_count : int
        In how many runs of memory objects it lies, one after the other.

    Notes
    -----
    The direction is OUT: a device can read it, none can write it. I/O Kit has no counterpart;
    it is what the kernel does with large blocks (`vm_map_copyin`: whole pages copy-on-write).
    """

    def __init__(self, frozen: Frozen, *, name: str) -> None:
        super().__init__(Direction.OUT, name)
        self._parts = frozen.extents
        self._length = sum(extent.length for extent in frozen.extents)
        self.copied_bytes = frozen.copied_bytes
        self.reason: SnapshotReason | None = frozen.reason
        self.extent_count = len(frozen.extents)
        # Now, so that a snapshot that there is can be read whatever becomes scarce later.
        self._window = map_extents(frozen.extents, Access.READ_ONLY)
        note_home(self._window, self, 0)

    @property
    def length(self) -> int:
        """Bytes described."""
        return self._length

    @property
    def max_access(self) -> Access:
        """Read-only, for everyone."""
        return Access.READ_ONLY

    @property
    def address(self) -> int:
        """Of the view of it in this task."""
        self._check_open()
        return self._window.address

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        return part_of(self._parts, offset, length)

    def _export(self) -> _core.Window:
        self._check_open()
        return self._window

    def _freeze(self, offset: int, length: int) -> Frozen:
        from memdesc.descriptors.freezing import Frozen

        return Frozen(tuple(self._extents(offset, length, Access.READ_ONLY)))

    def _check_store(self, offset: int, length: int) -> None:
        self._check_open()
        raise SealedError(
            f"{self.name!r} is a snapshot, which nobody can write: write its source, and take "
            "another one",
            errno=errno.EACCES,
        )

    def _wire(self, direction: Direction) -> Callable[[], None]:
        if direction.writes_memory:
            raise WiringError(
                f"{self.name!r} is a snapshot and can not be prepared for {direction.name}: "
                "prepare it for OUT",
                reason=WiringReason.NOT_WRITABLE,
                errno=errno.EACCES,
            )
        if all(_is_huge(extent) for extent in self._parts):
            return _nothing  # huge pages never leave memory, and mlock does not count them
        return wire(self._window.address, self._length, keep=self._window).release

    def _close(self) -> None:
        del self._window
        self._parts = ()


def _is_huge(extent: Extent) -> bool:
    return extent.object.page_size > page_size
