"""The copying and memory-entry facts of XNU's tests/vm, on Linux, through descriptors.

Each test names the file it comes from; docs/xnu-tests.md has the whole table. What copyin and
copyout themselves promise is in tests/test_copyio.py.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    CopyError,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    RangeError,
    SubMemoryDescriptor,
    Task,
    _core,
    copyin,
    copyout,
    page_size,
)
from memdesc.copyio import copyin_into
from memdesc.testing._kind import locked_pages, pattern

P = page_size
BOTH = _core.PROT_READ | _core.PROT_WRITE
PRIVATE = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
SHARED = _core.MAP_SHARED | _core.MAP_ANONYMOUS
SIZES = [1, P - 1, P, P + 1, 9 * P]

describe = MemoryDescriptor.with_address_range


def anonymous(pages: int, flags: int = PRIVATE, prot: int = BOTH) -> _core.MappedMemory:
    return _core.map_memory(0, pages * P, prot, flags, -1, 0)


# ── vm_allocation.c ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alignment", [1, P, 1 << 20])
@pytest.mark.parametrize("length", SIZES)
def test_allocated_memory_is_zero_filled(length: int, alignment: int) -> None:
    with BufferMemoryDescriptor(length, alignment=alignment) as buffer:
        assert buffer.address % alignment == 0
        assert buffer.read_bytes() == bytes(length)


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("start", [0, 1, P - 1])
def test_patterns_go_there_and_back(start: int, length: int) -> None:
    # mach_vm_write, then mach_vm_read: the offset inside the page is kept
    with BufferMemoryDescriptor(start + length) as buffer:
        part = SubMemoryDescriptor(buffer, start, length)
        for seed in (0, 1, 0xFF):
            part.write_bytes(0, pattern(length, seed))
            assert part.read_bytes() == pattern(length, seed)
            with part.map(unique=True) as mapping:
                assert mapping.address % P == start % P
                assert bytes(mapping) == pattern(length, seed)
        assert buffer.read_bytes(0, start) == bytes(start)


def test_no_bytes_are_read_and_written_with_success() -> None:
    with BufferMemoryDescriptor(P) as buffer:
        assert buffer.read_bytes(P, 0) == b""
        buffer.write_bytes(P, b"")
    nowhere = describe(P, P, Direction.OUT_IN)
    assert nowhere.read_bytes(0, 0) == b""
    nowhere.write_bytes(0, b"")


@pytest.fixture
def holed() -> Iterator[int]:
    """Four pages of private memory, the third of which is not mapped: the address."""
    room = anonymous(4)
    address = ctypes.c_void_p(room.address + 2 * P)
    assert ctypes.CDLL(None).munmap(address, ctypes.c_size_t(P)) == 0
    yield room.address
    _core.place_memory(room, 2 * P, P, BOTH, PRIVATE, -1, 0)


def test_a_hole_in_the_source_or_destination(holed: int) -> None:
    # KERN_INVALID_ADDRESS there, EFAULT here
    ranged = describe(holed, 4 * P, Direction.OUT_IN)
    for act in (ranged.read_bytes, lambda: ranged.write_bytes(0, bytes(4 * P))):
        with pytest.raises(CopyError) as caught:
            act()
        assert (caught.value.errno, caught.value.completed) == (errno.EFAULT, 2 * P)


def test_protected_source_and_destination() -> None:
    # KERN_PROTECTION_FAILURE there, EFAULT here, whatever the size
    for pages in (1, 9):
        made = anonymous(pages)
        ranged = describe(made.address, pages * P, Direction.OUT_IN)
        _core.mprotect(made.address, made.length, _core.PROT_READ)
        assert ranged.read_bytes() == bytes(pages * P)
        with pytest.raises(CopyError):
            ranged.write_bytes(0, b"1")
        _core.mprotect(made.address, made.length, _core.PROT_NONE)
        for act in (ranged.read_bytes, lambda one=ranged: one.write_bytes(0, b"1")):  # type: ignore[misc]
            with pytest.raises(CopyError) as caught:
                act()
            assert (caught.value.errno, caught.value.completed) == (errno.EFAULT, 0)


@pytest.mark.parametrize("nbytes", [2**63 - 1, 2**63 - P, 2**62])
def test_copies_that_wrap_or_are_too_large(nbytes: int) -> None:
    with BufferMemoryDescriptor(P) as buffer:
        with pytest.raises(RangeError):
            buffer.read_bytes(1, nbytes)
        with pytest.raises((InvalidArgument, MappingError, CopyError, MemoryError)):
            describe(buffer.address, nbytes, Direction.OUT).read_bytes()


def fresh(flags: int) -> tuple[MemoryDescriptor, object]:
    made = anonymous(3, flags)
    return describe(made.address + 5, 2 * P, Direction.OUT_IN), made


def copied_from(flags: int) -> tuple[MemoryDescriptor, object]:
    source, keep = fresh(flags)
    source.read_bytes()
    return source, keep


def copied_to(flags: int) -> tuple[MemoryDescriptor, object]:
    source, keep = fresh(flags)
    source.write_bytes(0, bytes(2 * P))
    return source, keep


def aliased(flags: int) -> tuple[MemoryDescriptor, object]:
    source, keep = fresh(flags)
    return source, (keep, source.map(unique=True) if flags == SHARED else None)


@pytest.mark.parametrize("make", [fresh, copied_from, copied_to, aliased])
@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_source_and_destination_are_apart_after_a_copy(make: object, flags: int) -> None:
    # vm_copy from fresh, copied-from, copied-to, shared and aliased sources
    source, keep = make(flags)  # type: ignore[operator]
    source.write_bytes(0, pattern(2 * P, 1))
    destination = BufferMemoryDescriptor(2 * P)
    destination.write_bytes(0, source.read_bytes())
    source.write_bytes(P - 1, b"source")
    assert destination.read_bytes() == pattern(2 * P, 1)
    destination.write_bytes(0, b"destination")
    assert source.read_bytes(0, 11) == pattern(2 * P, 1)[:11]
    del keep


# ── vm_wire_copy_share.c ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", [0, 3, 7])
def test_wire_a_page_copy_the_rest_share_all(page: int) -> None:
    with BufferMemoryDescriptor(8 * P, max_access=Access.READ_WRITE) as buffer:
        before = locked_pages()
        with buffer.map(unique=True) as mapping, mapping.wire(page * P, P):
            assert locked_pages() - before == 1
            rest = [part for part in range(8) if part != page]
            copies = [buffer.read_bytes(part * P, P) for part in rest]
            assert copies == [bytes(P)] * 7
            with buffer.map(unique=True) as shared:
                shared.array()[page * P] = 7
                assert memoryview(mapping)[page * P] == 7
            assert locked_pages() - before == 1
        assert locked_pages() == before


# ── vm_memory_entry_parent_test.c ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offset", [0, 1, P - 1, P, P + 9])
@pytest.mark.parametrize("inner", [0, 1, P - 1, P])
def test_a_child_keeps_the_offsets_of_its_parents(offset: int, inner: int) -> None:
    with BufferMemoryDescriptor(5 * P) as buffer:
        buffer.write_bytes(0, pattern(5 * P))
        child = SubMemoryDescriptor(SubMemoryDescriptor(buffer, offset, 4 * P - 9), inner, 2 * P)
        with child.map(unique=True) as mapping:
            assert mapping.address % P == (offset + inner) % P
            assert bytes(mapping) == pattern(5 * P)[offset + inner :][: 2 * P]


def test_the_same_range_again_is_the_same_mapping() -> None:
    # MAP_MEM_NAMED_REUSE gives the same handle
    with BufferMemoryDescriptor(4 * P) as buffer, buffer.map(offset=P, length=P) as first:
        with buffer.map(offset=P, length=P) as again, buffer.map(length=P) as other:
            assert again.address == first.address
            assert other.address != first.address


def test_no_child_has_more_rights_than_its_parent() -> None:
    # Excess is PROTECTION_FAILURE; under IS_MASK rights are intersected, and a later writable map
    # of the result is INVALID_RIGHT
    readable = BufferMemoryDescriptor(P)
    writable = BufferMemoryDescriptor(P, max_access=Access.READ_WRITE)
    for child in (SubMemoryDescriptor(readable, 0), MultiMemoryDescriptor([writable, readable])):
        assert child.max_access is Access.READ_ONLY
        with child.map() as mapping:
            assert mapping.access is Access.READ_ONLY
        with pytest.raises(MappingError) as caught:
            child.map(access=Access.READ_WRITE)
        assert caught.value.reason is MappingReason.ACCESS


def test_no_child_leaves_its_parent() -> None:
    with BufferMemoryDescriptor(4 * P) as buffer:
        for offset, length in [(0, 4 * P + 1), (P, 4 * P), (4 * P + 1, 0), (1, 2**63 - 1)]:
            with pytest.raises(RangeError):
                SubMemoryDescriptor(buffer, offset, length)


# ── mach_vm_map.c ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("offset", [0, 1, P // 2, P - 1, P, P + 1])
def test_unaligned_offsets_and_sizes(offset: int, unique: bool) -> None:
    # MAP_MEM_USE_DATA_ADDR: the address keeps the offset inside its page; whole pages underneath
    with BufferMemoryDescriptor(4 * P, max_access=Access.READ_WRITE) as buffer:
        buffer.write_bytes(0, pattern(4 * P))
        for size in (1, P // 2, P - 1, P, P + 1, 2 * P):
            with buffer.map(offset=offset, length=size, unique=unique) as mapping:
                assert (mapping.address % P, mapping.length) == (offset % P, size)
                assert bytes(mapping) == pattern(4 * P)[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, 4 * P), (4 * P, 1), (2**63 - 1, P), (P, 2**63 - 1), (2**63 - P, 2**63 - P)],
)
def test_offsets_and_sizes_that_overflow(offset: int, length: int) -> None:
    with BufferMemoryDescriptor(4 * P) as buffer, pytest.raises(MappingError) as caught:
        buffer.map(offset=offset, length=length)
    assert (caught.value.reason, caught.value.errno) == (MappingReason.OUT_OF_RANGE, errno.EINVAL)


# ── vm_test_mach_map.c ───────────────────────────────────────────────────────────────────────


def test_only_the_bytes_asked_for_change() -> None:
    # map_read_overwrite
    with BufferMemoryDescriptor(3 * P) as source, BufferMemoryDescriptor(3 * P) as target:
        source.write_bytes(0, b"s" * 3 * P)
        target.write_bytes(0, b"t" * 3 * P)
        with Task.current() as task:
            into = memoryview(target)[P - 3 : 2 * P + 3]
            assert copyin_into(task, source.address + 7, into) == P + 6
            expected = b"t" * (P - 3) + b"s" * (P + 6) + b"t" * (P - 3)
            assert target.read_bytes() == expected
            assert copyout(b"out", task, target.address + 1) == 3
        assert target.read_bytes() == b"tout" + expected[4:]


@pytest.mark.parametrize(("length", "reason"), [(0, "ZERO_LENGTH"), (-2, "OUT_OF_RANGE")])
def test_mapping_no_bytes_or_less(length: int, reason: str) -> None:
    # vm_remap_zero: sizes 0 and -2 are INVALID_ARGUMENT
    with BufferMemoryDescriptor(P) as buffer, pytest.raises(MappingError) as caught:
        buffer.map(length=length)
    assert caught.value.reason is MappingReason[reason]


def test_memory_is_read_back_after_its_address_was_mapped_anew() -> None:
    # vm_test_90774260.c: a copy is isolated from what its source becomes
    made = anonymous(2)
    with Task.current() as task:
        copyout(b"before", task, made.address)
        kept = copyin(task, made.address, 2 * P)
        _core.place_memory(made, 0, 2 * P, BOTH, PRIVATE, -1, 0)
        assert copyin(task, made.address, 6) == bytes(6)
    assert kept[:6] == b"before"
