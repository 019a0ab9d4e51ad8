"""Mapping extents of VM objects into this task, as one contiguous range of bytes.

Linux: mmap, madvise. No privilege.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from memdesc import _core
from memdesc.errors import InvalidArgument, MappingError, MappingReason, describe_errno
from memdesc.memory.memfd import MemoryObject
from memdesc.memory.page_kinds import transparent_page_size
from memdesc.memory.placing import map_aligned
from memdesc.vm.pages import MAX_LENGTH, Access, check_integer, page_size, round_page, trunc_page
from memdesc.vm.proc import read_text
from memdesc.vm.telling import explains

_LOWEST = "/proc/sys/vm/mmap_min_addr"

_immutable: weakref.WeakSet[_core.MappedMemory] = weakref.WeakSet()
"""What is mapped here of objects that nobody can write any more."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of one VM object. Bytes; neither need be a page multiple."""

    object: MemoryObject
    offset: int
    length: int


def part_of(extents: Sequence[Extent], offset: int, length: int) -> list[Extent]:
    """Give the extents of a part of the bytes that extents describe one after the other."""
    found, start = [], 0
    for extent in extents:
        begin, end = max(offset, start), min(offset + length, start + extent.length)
        if begin < end:
            found.append(Extent(extent.object, extent.offset + begin - start, end - begin))
        start += extent.length
    return found


@dataclass(frozen=True, slots=True)
class Placement:
    """How a mapping is to lie in its task.

    `at_address`: exactly there, page-aligned, never over anything that is mapped (None:
    anywhere). `guard_pages`: pages without access on each side. `prefault`: fault all pages in
    now. `unique`: at new addresses, never at those where the memory lies already. `alignment`: of
    the first byte's page, for mappings anywhere. `private`: writable whatever the access, and what
    is stored stays in this mapping, a page being copied at the first store to it.
    """

    at_address: int | None = None
    guard_pages: int = 0
    prefault: bool = False
    unique: bool = False
    alignment: int = page_size
    private: bool = False

    @property
    def flags(self) -> int:
        """Whose the stores are, as mmap is told."""
        return _core.MAP_PRIVATE if self.private else _core.MAP_SHARED

    def __post_init__(self) -> None:
        if not 0 <= check_integer(self.guard_pages, "guard_pages") <= 1 << 20:
            raise InvalidArgument(
                f"guard_pages is {self.guard_pages}: give 0 to {1 << 20}", errno=errno.EINVAL
            )
        if self.at_address is None:
            return
        if self.guard_pages:
            raise MappingError(
                "guard pages at a fixed address would lie over its neighbours: map anywhere",
                reason=MappingReason.GUARDS_NEED_ANYWHERE,
                errno=errno.EINVAL,
            )
        address = check_integer(self.at_address, "at_address")
        if address % page_size or address <= 0:
            raise MappingError(
                f"fixed address {address:#x} is not a positive multiple of the page size "
                f"({page_size}): round it with trunc_page",
                reason=MappingReason.ADDRESS_UNALIGNED,
                errno=errno.EINVAL,
            )


def map_extents(
    extents: Sequence[Extent], access: Access, placement: Placement | None = None
) -> _core.Window:
    """Map extents one after the other into this task, as one contiguous range of bytes.

    Returns
    -------
    Window
        Exactly the bytes of the extents. Its memory is unmapped when the last holder goes.

    Raises
    ------
    MappingError
        With its reason. What was mapped on the way is unmapped again.
    """
    placement = placement or Placement()
    pieces, skip, nbytes = _pieces(extents)
    size = sum(length for _, _, length in pieces)
    if size > MAX_LENGTH // 2:
        raise MappingError(
            f"{size:,} bytes do not fit into an address space",
            reason=MappingReason.NO_SPACE,
            errno=errno.ENOMEM,
        )
    granule = max(extent.object.page_size for extent in extents)
    if placement.at_address is not None and placement.at_address % granule:
        raise MappingError(
            f"fixed address {placement.at_address:#x} is not a multiple of {granule:,} bytes, the "
            "size of a page of this memory",
            reason=MappingReason.ADDRESS_UNALIGNED,
            errno=errno.EINVAL,
        )
    writable = access.writable or placement.private
    prot = _core.PROT_READ | (_core.PROT_WRITE if writable else 0)
    with explained(size, placement):
        guard = placement.guard_pages * page_size
        alignment = max(granule, placement.alignment)
        if len(pieces) == 1 and not guard and alignment <= granule:
            memory, start = _map_one(pieces[0], access, prot, placement)
        else:
            memory, start = _map_several(pieces, access, prot, placement, guard, alignment)
        if placement.prefault:
            populate = _core.MADV_POPULATE_WRITE if writable else _core.MADV_POPULATE_READ
            _core.madvise(memory.address + start, size, populate)
    if not writable and all(extent.object.immutable for extent in extents):
        _immutable.add(memory)
    return _core.Window(memory, start + skip, nbytes, writable)


def is_immutable(window: _core.Window) -> bool:
    """Tell whether the bytes can not change: their objects were sealed against it when mapped."""
    return window.memory in _immutable


def _pieces(extents: Sequence[Extent]) -> tuple[list[tuple[MemoryObject, int, int]], int, int]:
    """Whole pages of each extent, checked to meet on page borders: (pieces, skip, bytes)."""
    pieces: list[tuple[MemoryObject, int, int]] = []
    skip = nbytes = 0
    for index, extent in enumerate(extents):
        size = extent.object.page_size
        start = trunc_page(extent.offset, size)
        end = round_page(extent.offset + extent.length, size)
        first, last = index == 0, index == len(extents) - 1
        if first:
            skip = extent.offset - start
        elif start != extent.offset:
            raise _not_congruent(index, f"starts at offset {extent.offset:,} of its object", size)
        elif sum(length for _, _, length in pieces) % size:
            raise _not_congruent(index, f"would follow {nbytes:,} bytes of smaller pages", size)
        if not last and end != extent.offset + extent.length:
            at = extent.offset + extent.length
            raise _not_congruent(index, f"ends at offset {at:,} of its object", size)
        if end > round_page(extent.object.size, size):
            raise MappingError(
                f"the object has {extent.object.size:,} bytes, {end:,} would be mapped: the rest "
                "would be SIGBUS",
                reason=MappingReason.OUT_OF_RANGE,
                errno=errno.EINVAL,
            )
        pieces.append((extent.object, start, end - start))
        nbytes += extent.length
    return pieces, skip, nbytes


def _not_congruent(index: int, what: str, size: int) -> MappingError:
    return MappingError(
        f"range {index} {what}, inside a page of {size:,} bytes: only the first may start and "
        "only the last may end there, else the view would not be contiguous; align the inner "
        "borders, or map the ranges one by one",
        reason=MappingReason.NOT_CONGRUENT,
        errno=errno.EINVAL,
    )


def _map_one(
    piece: tuple[MemoryObject, int, int], access: Access, prot: int, placement: Placement
) -> tuple[_core.MappedMemory, int]:
    object_, offset, length = piece
    with _opened(object_, access) as fd:
        if placement.at_address is not None:
            flags = placement.flags | _core.MAP_FIXED_NOREPLACE
            return _core.map_memory(placement.at_address, length, prot, flags, fd, offset), 0
        huge = transparent_page_size()
        if object_.page_size == page_size and 0 < huge <= length:  # huge pages map whole, or not
            flags, phase = placement.flags, offset % huge
            return map_aligned(length, prot, fd, offset, huge, phase=phase, flags=flags)
        return _core.map_memory(0, length, prot, placement.flags, fd, offset), 0


def _map_several(
    pieces: Sequence[tuple[MemoryObject, int, int]],
    access: Access,
    prot: int,
    placement: Placement,
    guard: int,
    alignment: int,
) -> tuple[_core.MappedMemory, int]:
    """Reserve addresses, then place each piece inside: (the reserve, where the first one is)."""
    size = sum(length for _, _, length in pieces)
    if placement.at_address is not None:
        memory = _core.map_memory(
            placement.at_address,
            size,
            _core.PROT_NONE,
            _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | _core.MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
        start = 0
    else:
        memory = _core.reserve_memory(size + 2 * guard + alignment - page_size)
        start = guard + -(memory.address + guard) % alignment
    at = start
    for object_, offset, length in pieces:
        with _opened(object_, access) as fd:
            _core.place_memory(memory, at, length, prot, placement.flags, fd, offset)
        at += length
    return memory, start


@contextmanager
def _opened(object_: MemoryObject, access: Access) -> Iterator[int]:
    fd = object_.open(access)
    try:
        yield fd
    finally:
        os.close(fd)


@explains
def explained(error: Exception, size: int, placement: Placement) -> None:
    """Turn what the kernel answers into a MappingError with the reason looked up."""
    if isinstance(error, OSError) and not isinstance(error, MappingError):
        reason, remedy = _why(error, placement)
        raise MappingError(
            f"mapping {size:,} bytes failed: {describe_errno(error)}; {remedy}",
            reason=reason,
            errno=error.errno,
        ) from error


def _why(error: OSError, placement: Placement) -> tuple[MappingReason, str]:
    number = error.errno
    if number == errno.EEXIST:
        at = placement.at_address or 0
        return MappingReason.ADDRESS_IN_USE, f"something lies at {at:#x}: choose another address"
    if number in (errno.EMFILE, errno.ENFILE):
        return MappingReason.TOO_MANY_FILES, "close descriptors or raise `ulimit -n`"
    if number == errno.EPERM and _is_forbidden(placement.at_address):
        return MappingReason.NO_SPACE, "the fixed address is below vm.mmap_min_addr"
    if number in (errno.EPERM, errno.EACCES):
        return MappingReason.ACCESS, "the seals or the rights of the object forbid it"
    if number == errno.ENOMEM:
        limit = int(read_text("/proc/sys/vm/max_map_count"))
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
        if count >= limit - 2:
            return (
                MappingReason.TOO_MANY_MAPPINGS,
                f"this task has {count:,} regions, vm.max_map_count is {limit:,}: unmap some, "
                "describe several buffers as one, or raise the limit",
            )
        return MappingReason.NO_SPACE, "the address space or its limit (`ulimit -v`) is full"
    if number == errno.EINVAL and placement.at_address is not None:
        return MappingReason.NO_SPACE, "the fixed address is outside the task's address space"
    return MappingReason.NO_MEMORY, "the pages could not be had"


def _is_forbidden(address: int | None) -> bool:
    """Whether an address is among the lowest, which are for CAP_SYS_RAWIO alone."""
    return address is not None and address < int(read_text(_LOWEST))


def has_hole(extent: Extent) -> bool:
    """Whether a page was never touched. Never of huge pages: a mapping takes those beforehand."""
    fd = extent.object.open(Access.READ_ONLY)
    try:
        return os.lseek(fd, extent.offset, os.SEEK_HOLE) < extent.offset + extent.length
    finally:
        os.close(fd)
