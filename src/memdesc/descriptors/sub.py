"""SubMemoryDescriptor: a part of another descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, PageCounts, check_descriptor
from memdesc.errors import RangeError
from memdesc.mapping import Extent, Placement, check_range
from memdesc.vm.pages import Access, Direction

if TYPE_CHECKING:
    from memdesc.descriptors.freezing import Frozen, Reader


@final
class SubMemoryDescriptor(MemoryDescriptor):
    """Describes `length` bytes at `offset` of `parent` (I/O Kit: IOSubMemoryDescriptor).

    Parameters
    ----------
    parent : MemoryDescriptor
        Kept alive. `prepare` and `page_counts` act on the whole of it, as in the model.
    offset, length : int
        Bytes; `length` by default to the parent's end.
    direction : Direction, optional
        The parent's by default.

    Raises
    ------
    RangeError
        The range leaves the parent (checked with overflow, unlike the model).
    """

    def __init__(
        self,
        parent: MemoryDescriptor,
        offset: int,
        length: int | None = None,
        direction: Direction | None = None,
    ) -> None:
        check_descriptor(parent, "parent")
        super().__init__(parent.direction if direction is None else direction, parent.name)
        self.parent = parent
        self.offset, self._length = check_range(offset, length, parent.length, "the parent")

    @property
    def length(self) -> int:
        """Bytes described."""
        return self._length

    @property
    def max_access(self) -> Access:
        """The parent's."""
        return self.parent.max_access

    def _within(self, offset: int) -> int:
        """An offset of ours as the parent's; the parent may have been shortened meanwhile."""
        if self.offset + self._length > self.parent.length:
            raise RangeError(
                f"the parent {self.parent.name!r} now has {self.parent.length:,} bytes, this part "
                f"of it reaches to {self.offset + self._length:,}"
            )
        return self.offset + offset

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        return self.parent._extents(self._within(offset), length, access)

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        self._check_open()
        return self.parent._map_here(self._within(offset), length, access, placement)

    def _export(self) -> _core.Window | memoryview:
        self._check_open()
        whole, start = self.parent._export(), self._within(0)
        if isinstance(whole, _core.Window):
            return _core.Window(whole.memory, whole.offset + start, self._length, whole.writable)
        return whole[start : start + self._length]

    def _check_store(self, offset: int, length: int) -> None:
        self._check_open()
        self._check_writable("written")
        self.parent._check_store(self._within(offset), length)

    def _store(self, offset: int, source: memoryview) -> None:
        self.parent._store(self._within(offset), source)

    def _freeze(self, offset: int, length: int) -> Frozen:
        self._check_open()
        return self.parent._freeze(self._within(offset), length)

    def _reader(self) -> Reader:
        read, start = self.parent._reader(), self._within(0)
        return lambda offset, into: read(start + offset, into)

    def read_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out of the parent; see `MemoryDescriptor.read_bytes`."""
        self._check_open()
        offset, length = check_range(offset, length, self._length, "the descriptor")
        return self.parent.read_bytes(self._within(offset), length)

    def page_counts(self) -> PageCounts:
        """Count the pages of the whole parent, as the model does."""
        self._check_open()
        return self.parent.page_counts()

    def _wire(self, direction: Direction) -> Callable[[], None]:
        parent = self.parent
        parent.prepare(direction)

        def undo() -> None:
            if parent.prepare_count:  # closing it, or a complete() too many, may have undone it
                parent.complete()

        return undo
