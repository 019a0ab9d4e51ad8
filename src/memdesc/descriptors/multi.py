"""MultiMemoryDescriptor: several descriptors, one after the other, as one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, PageCounts, check_descriptor
from memdesc.errors import InvalidArgument
from memdesc.mapping import Extent, Placement, check_range, map_extents
from memdesc.vm.pages import Access, Direction

if TYPE_CHECKING:
    from memdesc.descriptors.freezing import Reader
    # collections.abc has it from 3.12 on


@final
class MultiMemoryDescriptor(MemoryDescriptor):
    """Describes the bytes of `members`, in their order (I/O Kit: IOMultiMemoryDescriptor).

    Mapped, it is one contiguous range; that needs inner borders on page borders
    (`MappingReason.NOT_CONGRUENT`). Reading and writing bytes needs nothing of the kind.

    Parameters
    ----------
    members : sequence of MemoryDescriptor
        At least one; kept alive.
    direction : Direction, optional
        The first member's by default.
    """

    def __init__(
        self, members: Sequence[MemoryDescriptor], direction: Direction | None = None
    ) -> None:
        if not isinstance(members, Sequence) or not members:
            raise InvalidArgument(
                f"members is {members!r}: give a sequence of at least one MemoryDescriptor",
                errno=errno.EINVAL,
            )
        for number, member in enumerate(members):
            check_descriptor(member, f"member {number}")
        name = "+".join(member.name for member in members[:3]) + ("+…" if members[3:] else "")
        super().__init__(members[0].direction if direction is None else direction, name)
        self.members = tuple(members)
        self._whole: _core.Window | memoryview | None = None
        self._whole_layout: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """The sum of the members' lengths."""
        return sum(member.length for member in self.members)

    @property
    def max_access(self) -> Access:
        """The least of the members'."""
        writable = all(member.max_access.writable for member in self.members)
        return Access.READ_WRITE if writable else Access.READ_ONLY

    def _parts(self, offset: int, length: int) -> Iterator[tuple[MemoryDescriptor, int, int]]:
        """The members that a range touches: (member, offset in it, length in it)."""
        start = 0
        for member in self.members:
            begin, end = max(offset, start), min(offset + length, start + member.length)
            if begin < end:
                yield member, begin - start, end - begin
            start += member.length

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        return [
            extent
            for member, at, nbytes in self._parts(offset, length)
            for extent in member._extents(at, nbytes, access)
        ]

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        self._check_open()
        parts = list(self._parts(offset, length))
        if len(parts) == 1:
            member, at, nbytes = parts[0]
            return member._map_here(at, nbytes, access, placement)
        return map_extents(self._extents(offset, length, access), access, placement)

    def _export(self) -> _core.Window | memoryview:
        self._check_open()
        with self._lock:
            layout = self._layout()
            if self._whole is None or self._whole_layout != layout:
                self._whole, self._whole_layout = self.map()._export(), layout
            return self._whole

    def _layout(self) -> tuple[int, ...]:
        """The lengths that a view of the whole is made for: `set_length` moves them."""
        lengths: list[int] = []
        for member in self.members:
            member._check_open()
            lengths += member._layout() if isinstance(member, type(self)) else [member.length]
        return tuple(lengths)

    def _reader(self) -> Reader:
        parts = [
            (member._reader(), at, nbytes) for member, at, nbytes in self._parts(0, self.length)
        ]

        def read(offset: int, into: memoryview) -> None:
            start, end = 0, offset + into.nbytes
            for reader, at, nbytes in parts:
                low, high = max(offset, start), min(end, start + nbytes)
                if low < high:
                    with into[low - offset : high - offset] as part:
                        reader(at + low - start, part)
                start += nbytes

        return read

    def read_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out, member by member; see `MemoryDescriptor.read_bytes`."""
        self._check_open()
        offset, length = check_range(offset, length, self.length, "the descriptor")
        return b"".join(
            member.read_bytes(at, nbytes) for member, at, nbytes in self._parts(offset, length)
        )

    def _check_store(self, offset: int, length: int) -> None:
        self._check_open()
        self._check_writable("written")
        for member, at, nbytes in self._parts(offset, length):
            member._check_store(at, nbytes)

    def _store(self, offset: int, source: memoryview) -> None:
        done = 0
        for member, at, nbytes in self._parts(offset, source.nbytes):
            member._store(at, source[done : done + nbytes])
            done += nbytes

    def page_counts(self) -> PageCounts:
        """Add up the members' counts."""
        self._check_open()
        counts = [member.page_counts() for member in self.members]
        return PageCounts(sum(c.total for c in counts), sum(c.resident for c in counts))

    def _wire(self, direction: Direction) -> Callable[[], None]:
        prepared: list[MemoryDescriptor] = []

        def undo() -> None:
            while prepared:
                member = prepared.pop()
                if member.prepare_count:  # closing it, or a complete() too many, may have undone it
                    member.complete()

        try:
            for member in self.members:
                member.prepare(direction)
                prepared.append(member)
        except BaseException:
            undo()
            raise
        return undo

    def _close(self) -> None:
        self._whole = None
