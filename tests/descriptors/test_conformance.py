"""Every kind of descriptor, and kinds inside of kinds, pass the one suite that ships."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    Direction,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    PageKind,
    SubMemoryDescriptor,
    _core,
    page_size,
    receive_descriptor,
    send_descriptor,
)
from memdesc.testing import conformance as suite
from memdesc.vm.pages import page_span, round_page

Runs = list[tuple[int, int]]
SHIFT = 60
"""Where inside a page the parts begin, in the kinds that have any."""


def part_of(runs: Runs, offset: int, length: int) -> Runs:
    found, start = [], 0
    for address, nbytes in runs:
        low, high = max(offset, start), min(offset + length, start + nbytes)
        if low < high:
            found.append((address + low - start, high - low))
        start += nbytes
    return found


def runs_of(descriptor: Any) -> Runs:
    """Where the owners' views of the bytes lie, worked out from how the descriptor was made."""
    if isinstance(descriptor, SubMemoryDescriptor):
        return part_of(runs_of(descriptor.parent), descriptor.offset, descriptor.length)
    if isinstance(descriptor, MultiMemoryDescriptor):
        return [run for member in descriptor.members for run in runs_of(member)]
    assert isinstance(descriptor, BufferMemoryDescriptor)
    return [(descriptor.address, descriptor.length)]


def pages_of(descriptor: Any) -> int:
    """A part is prepared by preparing the whole, as in the model."""
    if isinstance(descriptor, SubMemoryDescriptor):
        return pages_of(descriptor.parent)
    if isinstance(descriptor, MultiMemoryDescriptor):
        return sum(pages_of(member) for member in descriptor.members)
    return round_page(descriptor.capacity) // page_size


class Composed(suite.DescriptorTests):
    """Kinds that consist of buffers in this task."""

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return runs_of(descriptor)

    def pages_behind(self, descriptor: MemoryDescriptor) -> int:
        return pages_of(descriptor)


def buffer(length: int, max_access: Access, direction: Direction) -> BufferMemoryDescriptor:
    return BufferMemoryDescriptor(length, max_access=max_access, direction=direction)


def sub(length: int, max_access: Access, direction: Direction) -> SubMemoryDescriptor:
    whole = buffer(SHIFT + length + 2 * page_size, max_access, Direction.NONE)
    return SubMemoryDescriptor(whole, SHIFT, length, direction)


def multi(length: int, max_access: Access, direction: Direction) -> MultiMemoryDescriptor:
    """Of up to three members, the inner borders on page borders."""
    sizes = [page_size] * min(2, (length - 1) // page_size)
    members = [buffer(n, max_access, Direction.NONE) for n in [*sizes, length - sum(sizes)]]
    return MultiMemoryDescriptor(members, direction)


class TestBuffer(Composed):
    make = staticmethod(buffer)


class TestLazyBuffer(Composed):
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        return BufferMemoryDescriptor(
            length, max_access=max_access, direction=direction, lazy=True, alignment=1 << 20
        )


class TestGrownBuffer(Composed):
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        grown = BufferMemoryDescriptor(
            (length + 1) // 2,
            max_access=max_access,
            direction=direction,
            reserve=length + (4 << 20),
        )
        grown.grow(length)
        return grown


class TestTransparentHugeBuffer(Composed):
    """Inside a huge page of which it uses the first part: what is past it is in no view."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        return BufferMemoryDescriptor(
            length,
            max_access=max_access,
            direction=direction,
            pages=PageKind.TRANSPARENT_HUGE,
            reserve=length + (4 << 20),
        )


class TestSub(Composed):
    make = staticmethod(sub)


class TestMulti(Composed):
    make = staticmethod(multi)


class TestSubOfSub(Composed):
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        outer = sub(length + page_size, max_access, Direction.NONE)
        return SubMemoryDescriptor(outer, page_size - 1, length, direction)


class TestSubOfMulti(Composed):
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        whole = multi(SHIFT + length + page_size, max_access, Direction.NONE)
        return SubMemoryDescriptor(whole, SHIFT, length, direction)


class TestMultiOfSub(Composed):
    """The first part begins inside a page, the last ends inside one; they come of two buffers."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        first = min(length, 2 * page_size - SHIFT)
        parts: list[MemoryDescriptor] = []
        for size, offset in [(first, SHIFT), (length - first, 2 * page_size)]:
            if size:
                whole = buffer(offset + size, max_access, Direction.NONE)
                parts.append(SubMemoryDescriptor(whole, offset, size))
        return MultiMemoryDescriptor(parts, direction)


class TestMultiOfMulti(Composed):
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        inner = multi(page_size, max_access, Direction.NONE)
        if length <= page_size:
            return MultiMemoryDescriptor([multi(length, max_access, direction)], direction)
        rest = multi(length - page_size, max_access, Direction.NONE)
        return MultiMemoryDescriptor([inner, rest], direction)


class Received(suite.DescriptorTests):
    """What a peer gave, through a socket pair; the giver keeps what it gave."""

    giver: Callable[[int, Access, Direction], Any]

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        given = type(self).giver(length, max_access, direction)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            send_descriptor(ours, given)
            received = receive_descriptor(theirs)
        self.givers = getattr(self, "givers", weakref.WeakKeyDictionary())
        self.givers[received] = given
        return received

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return runs_of(self.givers[descriptor])

    def pages_behind(self, descriptor: MemoryDescriptor) -> int:
        """Its own mapping is wired: the pages that its bytes touch."""
        address = self.behind(descriptor)[0][0] % page_size
        return page_span(address, descriptor.length)[1] // page_size


class TestReceived(Received):
    giver = staticmethod(buffer)


class TestReceivedSub(Received):
    giver = staticmethod(sub)


class TestReceivedMulti(Received):
    """Several VM objects travel in one message."""

    giver = staticmethod(multi)


class TestSharedAddressRange(suite.DescriptorTests):
    """Shared memory of this task that the library did not make: a memfd's, mapped by hand."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        span = round_page(SHIFT + length)
        fd = os.memfd_create("by-hand", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.fds = [*getattr(self, "fds", []), fd]
        os.truncate(fd, span)
        seal(fd)
        prot = _core.PROT_READ | (_core.PROT_WRITE if max_access.writable else 0)
        shown = _core.map_memory(0, span, prot, _core.MAP_SHARED, fd, 0)
        both = _core.PROT_READ | _core.PROT_WRITE
        writable = _core.map_memory(0, span, both, _core.MAP_SHARED, fd, 0)
        made = MemoryDescriptor.with_address_range(shown.address + SHIFT, length, direction)
        self.memory = getattr(self, "memory", weakref.WeakKeyDictionary())
        self.memory[made] = (shown, writable)
        return made

    @pytest.fixture(autouse=True)
    def close_fds(self) -> Any:
        yield
        for fd in self.fds:
            os.close(fd)

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return [(self.memory[descriptor][1].address + SHIFT, descriptor.length)]

    def test_views_keep_the_memory_alive(self) -> None:
        super().test_views_keep_the_memory_alive()
        self.memory.clear()


class TestOurArrayAsBuffer(suite.DescriptorTests):
    """`with_buffer` over an array of a buffer of ours: it lies in a VM object, so it maps."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        whole = buffer(SHIFT + length, max_access, Direction.NONE)
        made = MemoryDescriptor.with_buffer(whole.array()[SHIFT:], direction)
        self.wholes = getattr(self, "wholes", weakref.WeakKeyDictionary())
        self.wholes[made] = whole
        return made

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return [(self.wholes[descriptor].address + SHIFT, descriptor.length)]


class TestPrivateBuffer(suite.BytesTests, suite.ViewTests, suite.PreparationTests):
    """`with_buffer` over private memory: mapping it here is an alias, elsewhere it is refused."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        return MemoryDescriptor.with_buffer(bytearray(length), direction)

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return [(descriptor.address, descriptor.length)]  # type: ignore[attr-defined]

    def test_a_mapping_here_is_an_alias(self) -> None:
        # XNU: no new mapping at all, the original address (IOMemoryDescriptor.cpp:4963).
        with self.new() as descriptor, descriptor.map(offset=5, length=9) as alias:
            assert (alias.address, alias.length) == (self.behind(descriptor)[0][0] + 5, 9)
            alias.array()[0] = 77
            assert self.look(descriptor, 5, 1) == b"M"
            with memoryview(alias), pytest.raises(BufferError):
                alias.unmap()
            alias.unmap()
            assert not alias.is_mapped

    @pytest.mark.parametrize("how", [{"unique": True}, {"guard_pages": 1}, {"at_address": 1 << 40}])
    def test_new_addresses_can_not_be_had(self, how: dict[str, Any]) -> None:
        with self.new() as descriptor, pytest.raises(MappingError) as caught:
            descriptor.map(**how)
        assert caught.value.reason is MappingReason.PRIVATE_MEMORY
        assert caught.value.errno == errno.EACCES


class TestPrivateAddressRange(suite.BytesTests, suite.PreparationTests):
    """Private memory by its address: copied and wired, but no mapping of it can be made."""

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        memory = mmap.mmap(-1, round_page(SHIFT + length), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = _core.buffer_address(memory)[0] + SHIFT
        made = MemoryDescriptor.with_address_range(address, length, direction)
        self.memory = getattr(self, "memory", weakref.WeakKeyDictionary())
        self.memory[made] = memory
        return made

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return [(descriptor.address, descriptor.length)]  # type: ignore[attr-defined]

    @pytest.mark.parametrize("use", [lambda d: d.map(), memoryview, lambda d: d.array()])
    def test_no_mapping_and_no_view(self, use: Callable[[Any], object]) -> None:
        with self.new() as descriptor, pytest.raises(MappingError) as caught:
            use(descriptor)
        assert caught.value.reason is MappingReason.PRIVATE_MEMORY
        assert caught.value.errno == errno.EACCES


def seal(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
