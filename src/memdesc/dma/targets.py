"""The memory of a descriptor, held in place while a device reads or writes it.

A device writes to pages behind the back of whatever else moves them: a snapshot, or the move to
new memory after one. So each buffer under a transfer is marked as registered for its time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memdesc import _core
from memdesc.descriptors.address_range import AddressRangeDescriptor, PythonBufferDescriptor
from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import InvalidArgument, SealedError
from memdesc.mapping import LocalMemoryMap, check_range
from memdesc.memory.memfd import OwnedObject, find_owned
from memdesc.vm.pages import MAX_LENGTH, check_integer
from memdesc.vm.regions import regions_in
from memdesc.vm.task import Task

Memory = MemoryDescriptor | LocalMemoryMap
"""What a device can be given: what describes memory, or what shows it in this task."""

GIB = 30
"""A registered buffer has at most 1 GiB (io_uring_register(2)); longer memory has several."""


class _Token:
    __slots__ = ("__weakref__",)


class Mark:
    """Tells the life of a buffer's memory that a device has it, as long as this lives."""

    __slots__ = ("_token",)

    def __init__(self, object_: OwnedObject) -> None:
        self._token: _Token | None = _Token()  # kept before it counts: an interrupt comes anywhere
        with object_.lock:
            object_.own_fd()  # moves it to memory of its own, if it shares that with a snapshot
            object_.lifecycle.register(self._token)

    def release(self) -> None:
        """Undo it; again is a no-op. Takes no lock: the collector may call it."""
        self._token = None


@dataclass(slots=True)
class Piece:
    """Bytes that lie at one address of this task.

    Attributes
    ----------
    start, nbytes : int
        Of the bytes, in the descriptor that the transfer is of.
    address : int
        Of the first of them.
    leaf : MemoryDescriptor or LocalMemoryMap
        Whose memory it is, with nothing in between.
    base : int
        Address of the leaf's first byte.
    view : memoryview
        Of all of the leaf. Keeps the addresses.
    slots : tuple of int
        Under which the leaf is registered, one for each GiB; empty if it is not.
    """

    start: int
    nbytes: int
    address: int
    leaf: Memory
    base: int
    view: memoryview
    slots: tuple[int, ...] = ()

    def slot(self, address: int, nbytes: int) -> int:
        """Tell the registered buffer that a range lies in, or -1."""
        if not self.slots:
            return -1
        at = address - self.base
        index = at >> GIB
        return self.slots[index] if (at + nbytes - 1) >> GIB == index else -1


class Target:
    """A range of a descriptor, held for a device; `release` lets go of it.

    Parameters
    ----------
    descriptor : MemoryDescriptor or LocalMemoryMap
    offset, length : int
        Bytes of it, checked to lie in it.
    writes_memory : bool
        Whether the device writes the memory (a file is read).

    Raises
    ------
    SealedError, WiringError
        The device would write what may not be written.
    MappingError
        The memory is not to be seen from this task.
    """

    def __init__(
        self, descriptor: Memory, offset: int, length: int, *, writes_memory: bool
    ) -> None:
        self._marks: list[Mark] = []
        self.pieces: list[Piece] = []
        if writes_memory and isinstance(descriptor, MemoryDescriptor):
            descriptor._check_store(offset, length)
        start = 0
        views: dict[Memory, memoryview] = {}
        for leaf, at, nbytes in leaves(descriptor, offset, length):
            if leaf not in views:
                self._marks += _marks(leaf)
                views[leaf] = memoryview(leaf)
            view = views[leaf]
            base, _, readonly = _core.buffer_address(view)
            if writes_memory and readonly:
                raise SealedError(
                    f"{name_of(leaf)} is read-only in this task, so no device may write it: "
                    "only its owner fills it",
                    errno=errno.EACCES,
                )
            self.pieces.append(Piece(offset + start, nbytes, base + at, leaf, base, view))
            start += nbytes

    def spans(self, offset: int, length: int) -> Iterator[tuple[Piece, int, int]]:
        """Give where a part of the range lies: (piece, address, bytes), in order."""
        end = offset + length
        for piece in self.pieces:
            low, high = max(offset, piece.start), min(end, piece.start + piece.nbytes)
            if low < high:
                yield piece, piece.address + low - piece.start, high - low

    def release(self) -> None:
        """Let go of the memory."""
        self.pieces.clear()
        for mark in self._marks:
            mark.release()
        self._marks.clear()


def name_of(memory: Memory) -> str:
    """What messages call it."""
    return repr(memory.name) if isinstance(memory, MemoryDescriptor) else repr(memory)


def leaves(descriptor: Memory, offset: int, length: int) -> Iterator[tuple[Memory, int, int]]:
    """Give what has the bytes of a range itself: (descriptor, offset in it, bytes), in order."""
    if isinstance(descriptor, LocalMemoryMap):
        yield descriptor, offset, length
        return
    descriptor._check_open()
    if isinstance(descriptor, SubMemoryDescriptor):
        yield from leaves(descriptor.parent, descriptor._within(offset), length)
    elif isinstance(descriptor, MultiMemoryDescriptor):
        for member, at, nbytes in descriptor._parts(offset, length):
            yield from leaves(member, at, nbytes)
    elif length:
        yield descriptor, offset, length


def _marks(leaf: Memory) -> list[Mark]:
    """Mark the buffers of this task that a leaf's memory belongs to."""
    if isinstance(leaf, LocalMemoryMap):
        return _marks_under(name_of(leaf), leaf.address, leaf.length)
    if isinstance(leaf, BufferMemoryDescriptor):
        return [Mark(leaf.memory)]
    if isinstance(leaf, AddressRangeDescriptor | PythonBufferDescriptor):
        task = leaf.task if isinstance(leaf, AddressRangeDescriptor) else Task.current()
        return _marks_under(repr(leaf.name), leaf.address, leaf.length) if task.is_current else []
    return []  # a snapshot's, which stays as it is; or another task's, which marks its own


def _marks_under(name: str, address: int, length: int) -> list[Mark]:
    """As `_marks`, for addresses; a private view over a buffer's memory can not be held."""
    marks = []
    for region in regions_in(Task.current(), address, length):
        owned = find_owned((os.makedev(*region.object.device), region.object.inode))
        if owned is None:
            continue
        if not region.shared:
            raise InvalidArgument(
                f"{name} shows a buffer that shares its memory with a snapshot, and has to be "
                "moved first: give the buffer itself, not a view of it",
                errno=errno.EINVAL,
            )
        marks.append(Mark(owned))
    return marks


Ask = tuple[MemoryDescriptor, int, int | None, int]
"""What `read_many` is given: (descriptor, file_offset, length, offset)."""

Checked = tuple[MemoryDescriptor, int, int, int]


def check_asks(asks: Iterable[Ask]) -> list[Checked]:
    """Check what is asked for; all of it before anything is done."""
    checked: list[Checked] = []
    known, nbytes = None, -1
    for ask in asks:
        descriptor, file_offset, length, offset = ask
        # The common case of many small ones, at a third of the time.
        if (
            descriptor is known
            and type(file_offset) is type(length) is type(offset) is int
            and 0 <= file_offset < 1 << 60
            and offset >= 0
            and 0 <= length <= nbytes - offset
        ):
            checked.append(ask)  # type: ignore[arg-type]
        else:
            checked.append(_check(*ask))
            known, nbytes = descriptor, descriptor.length
    return checked


def hold(asks: Iterable[Checked], *, writes_memory: bool) -> dict[MemoryDescriptor, Target]:
    """Hold each descriptor once, from the first of its bytes that is asked for to the last."""
    spans: dict[MemoryDescriptor, tuple[int, int]] = {}
    for descriptor, _, length, offset in asks:
        low, high = spans.get(descriptor, (offset, offset))
        if offset < low or offset + length > high or low == high:
            spans[descriptor] = min(low, offset), max(high, offset + length)
    return {
        descriptor: Target(descriptor, low, high - low, writes_memory=writes_memory)
        for descriptor, (low, high) in spans.items()
    }


def _check(descriptor: object, file_offset: int, length: int | None, offset: int) -> Checked:
    known = check_descriptor(descriptor, "descriptor")
    known._check_open()
    offset, length = check_range(offset, length, known.length, "the descriptor")
    file_offset = check_integer(file_offset, "file_offset")
    if file_offset < 0 or file_offset > MAX_LENGTH - length:
        raise InvalidArgument(
            f"{length:,} bytes at offset {file_offset:,} of a file: offsets are 0 to 2**63 - 1",
            errno=errno.EINVAL,
        )
    return known, file_offset, length, offset
