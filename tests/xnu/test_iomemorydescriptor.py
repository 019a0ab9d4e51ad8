"""The facts that iokit/Tests/TestIOMemoryDescriptor.cpp of XNU asserts, on Linux.

Each test names the one it comes from. docs/xnu-tests.md lists them all, with those that have no
counterpart here and why.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    Service,
    SubMemoryDescriptor,
    Task,
    _core,
    connect,
    page_size,
)
from memdesc.testing import failing
from memdesc.testing._kind import region
from memdesc.vm.pages import page_span

P = page_size
LONG = "MEMDESC_LONG" in os.environ

describe = MemoryDescriptor.with_address_range


@pytest.fixture
def data() -> Iterator[BufferMemoryDescriptor]:
    """Eight pages, each filled with 0xD0 and its number."""
    with BufferMemoryDescriptor(8 * P, max_access=Access.READ_WRITE) as buffer:
        for page in range(8):
            buffer.write_bytes(page * P, bytes([0xD0 | page]) * P)
        yield buffer


def mapped_pages(descriptor: MemoryDescriptor) -> tuple[int, int]:
    """Whole pages under a mapping, and the offset of its first byte (getDMAMapLength)."""
    with descriptor.map(unique=True) as mapping:
        start, span = page_span(mapping.address, mapping.length)
        return span // P, mapping.address - start


def test_pages_that_a_range_touches(data: BufferMemoryDescriptor) -> None:
    # IOMultMemoryDescriptorTest: 2 bytes are 1 page at offset 0, 4 over a border are 2 at page - 2
    assert mapped_pages(describe(data.address, 2, Direction.OUT_IN)) == (1, 0)
    assert mapped_pages(describe(data.address + P - 2, 4, Direction.OUT_IN)) == (2, P - 2)


def test_ranges_swapped_mapped_from_the_middle(data: BufferMemoryDescriptor) -> None:
    # IOMultMemoryDescriptorTest
    swapped = MultiMemoryDescriptor(
        [
            describe(data.address + 4 * P, 4 * P, Direction.OUT_IN),
            describe(data.address, 4 * P, Direction.OUT_IN),
        ]
    )
    part = SubMemoryDescriptor(swapped, 3 * P, 2 * P)
    last = describe(data.address + 3 * P, P, Direction.OUT_IN)
    assert (mapped_pages(swapped), mapped_pages(part)) == ((8, 0), (2, 0))
    several = MultiMemoryDescriptor([swapped, part, last])
    assert mapped_pages(several) == (11, 0)
    with several.map(offset=7 * P, length=several.length - 7 * P, guard_pages=1) as mapping:
        assert mapping.length == 4 * P
        expected = b"".join(bytes([value]) * P for value in (0xD3, 0xD7, 0xD0, 0xD3))
        assert bytes(mapping) == expected
        for address in (mapping.address - P, mapping.address + 4 * P):
            guard = region(address)
            assert guard is not None
            assert guard.permissions == "---p"


def test_prefaulted_memory_is_there_at_once() -> None:
    # IOMemoryPrefaultTest (there it is touched with a spin lock held: no fault is allowed)
    with BufferMemoryDescriptor(4 * P, lazy=True) as buffer, buffer.prepared():
        with buffer.map(prefault=True) as mapping:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                entries = os.pread(pagemap.fileno(), 4 * 8, mapping.address // P * 8)
            assert [entry >> 63 for entry in memoryview(entries).cast("Q")] == [1] * 4


@pytest.mark.parametrize("capacity", [2**64 - 1, 2**63 - 1])
def test_a_capacity_that_overflows(capacity: int) -> None:
    # IOBMDOverflowTest
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(capacity)


def test_a_length_set_larger_again_is_mapped() -> None:
    # IOBMDSetLengthMapTest
    with BufferMemoryDescriptor(0x4000) as buffer:
        for length in (0x100, 0x200):
            buffer.set_length(length)
            with buffer.map() as mapping:
                assert mapping.length == length
                buffer.write_bytes(length - 1, b"\xaa")
                assert bytes(mapping)[-1] == 0xAA


def test_a_descriptor_of_no_bytes() -> None:
    # ZeroLengthTest: created, prepared and completed without a crash. Here a buffer of no bytes is
    # refused at creation; one can be had by set_length, or as a part.
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(0)
    with BufferMemoryDescriptor(P) as buffer:
        part = SubMemoryDescriptor(buffer, P, 0)
        buffer.set_length(0)
        for empty in (buffer, MultiMemoryDescriptor([buffer, buffer])):
            empty.prepare()
            empty.complete()
            assert empty.read_bytes() == b""
            with pytest.raises(MappingError) as caught:
                empty.map()
            assert caught.value.reason is MappingReason.ZERO_LENGTH
        buffer.set_length(P)
        with part.prepared():
            assert part.length == 0


@pytest.mark.parametrize("address", [1 << 62, (1 << 63) - P])
def test_a_fixed_address_that_can_not_be(address: int) -> None:
    # BadFixedAllocTest
    with BufferMemoryDescriptor(P) as buffer, pytest.raises(MappingError) as caught:
        buffer.map(at_address=address)
    assert caught.value.reason is MappingReason.NO_SPACE


def test_a_fixed_address_among_the_lowest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # BadFixedAllocTest takes 0x2000. Linux keeps what is below vm.mmap_min_addr from all but
    # CAP_SYS_RAWIO: EPERM, which other addresses answer for seals.
    lowest = tmp_path / "mmap_min_addr"
    lowest.write_text("65536\n")
    monkeypatch.setattr("memdesc.mapping.place._LOWEST", lowest)
    with BufferMemoryDescriptor(P) as buffer:
        for address, reason in [(0x2000, "NO_SPACE"), (1 << 20, "ACCESS")]:
            with failing("map_memory", errno.EPERM), pytest.raises(MappingError) as caught:
                buffer.map(at_address=address // P * P or P)
            assert caught.value.reason is MappingReason[reason]


def test_a_read_only_map_follows_its_source() -> None:
    # IOMemoryMapCopyOnWriteTest, without the flag: a read-only map of the range at + 0x800, then a
    # store of the application. With the flag it is a snapshot.
    with BufferMemoryDescriptor(4 * P) as buffer:
        buffer.write_bytes(0, b"\x33" * 4 * P)
        user = describe(buffer.address + 0x800, 2 * P, Direction.OUT)
        with user.map(access=Access.READ_ONLY, unique=True) as mapping:
            assert mapping.address % P == 0x800
            buffer.array()[0x800 + 0x123] = 0x99
            assert memoryview(mapping)[0x123] == 0x99
            rest = bytearray(mapping)
            rest[0x123] = 0x33
            assert rest == b"\x33" * 2 * P


def test_memory_is_found_by_its_name() -> None:
    # AllocationNameTest: memory is accounted to the name that it was allocated under
    with BufferMemoryDescriptor(3 * P, name="accounted") as buffer:
        shown = region(buffer.address)
        assert shown is not None
        assert (shown.object.name, shown.length) == ("accounted", 3 * P)


@pytest.mark.parametrize("guards", [1, 2, 3, 4])
def test_guards_around_a_page(guards: int) -> None:
    # IOGuardPageMDTest: there the guards are members of a Multi, here they belong to the mapping
    with BufferMemoryDescriptor(P) as page, BufferMemoryDescriptor(P + 1) as other:
        page.write_bytes(0, b"\x3c" * P)
        with MultiMemoryDescriptor([page, other]).map(guard_pages=guards) as mapping:
            assert mapping.length == 2 * P + 1
            assert bytes(mapping)[:P] == b"\x3c" * P
            for number in range(guards):
                for address in (
                    mapping.address - (number + 1) * P,
                    mapping.address + (3 + number) * P,
                ):
                    guard = region(address)
                    assert guard is not None
                    assert guard.permissions == "---p"
        # A buffer itself: capacity as asked for, whole pages aligned, a unique map as long.
        assert (other.capacity, other.address % P) == (P + 1, 0)
        with other.map(unique=True, guard_pages=guards) as mapping:
            assert (mapping.length, bytes(mapping)) == (other.length, other.read_bytes())


# ── The main loop ────────────────────────────────────────────────────────────────────────────

PAGES = 12


@pytest.fixture
def fragmented() -> Iterator[tuple[int, bytes]]:
    """Twelve pages of words that count up, in six regions of three VM objects."""
    buffers = [BufferMemoryDescriptor(4 * P, name=f"fragment {number}") for number in range(3)]
    room = _core.reserve_memory(PAGES * P)
    words = b"".join(number.to_bytes(4, "little") for number in range(PAGES * P // 4))
    for index, (number, offset) in enumerate(itertools.product(range(3), (2 * P, 0))):
        buffers[number].write_bytes(offset, words[index * 2 * P :][: 2 * P])
        fd = buffers[number].memory.open(Access.READ_ONLY)
        try:
            at = index * 2 * P
            _core.place_memory(room, at, 2 * P, _core.PROT_READ, _core.MAP_SHARED, fd, offset)
        finally:
            os.close(fd)
    yield room.address, words
    for buffer in buffers:
        buffer.close()


def sources(start: int, length: int) -> Iterator[list[tuple[int, int]]]:
    """The bytes [start, start + length) as one to three ranges, in every order that can be mapped.

    Inner borders are page borders, as a contiguous view needs them.
    """
    borders = [at for at in range(-(-start // P) * P, start + length, P) if at > start]
    yield [(start, length)]
    for cuts in ([borders[0]] if borders else [], borders[:1] + borders[-1:]):
        ends = sorted({*cuts, start + length})
        begins = [start, *ends[:-1]]
        ranges = [(low, high - low) for low, high in zip(begins, ends, strict=True)]
        if len(ranges) < 2:
            continue
        for order in itertools.permutations(ranges):
            heads = all(low % P == 0 for low, _ in order[1:])
            tails = all((low + size) % P == 0 for low, size in order[:-1])
            if heads and tails:
                yield list(order)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, PAGES * P),
        (0, 1),
        (8, P),
        (P - 4, 8),
        (P, 3 * P),
        (P + 12, 5 * P + 4),
        (7, 9 * P),
    ],
)
def test_main_loop(fragmented: tuple[int, bytes], start: int, length: int) -> None:
    # The main loop: many source offsets and sizes, one to three ranges, permuted; many map offsets
    # and sizes; the mapping, guarded, is read word by word and against readBytes.
    base, words = fragmented
    with Task.current() as task:
        for ranges in sources(start, length):
            members = [
                describe(base + low, size, Direction.OUT, task, allow_several_objects=True)
                for low, size in ranges
            ]
            source = members[0] if len(members) == 1 else MultiMemoryDescriptor(members)
            expected = b"".join(words[low : low + size] for low, size in ranges)
            assert source.read_bytes() == expected
            for offset in {0, 4, P - 1, 2 * P + 4, length - 1}:
                for size in {1, P + 1, length - offset}:
                    if offset < 0 or size < 1 or offset + size > length:
                        continue
                    with source.map(offset=offset, length=size, guard_pages=1) as mapping:
                        assert bytes(mapping) == expected[offset : offset + size]
                        assert source.read_bytes(offset, size) == bytes(mapping)


def test_mapping_again_and_again_leaves_nothing() -> None:
    # iokit/map_memory_port_leak_45265408.c: open, map read-only, unmap, close 200,000 times
    before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for number in range(100_000 if LONG else 2_000):
        with BufferMemoryDescriptor(P, lazy=True) as buffer:
            mapping = buffer.map(access=Access.READ_ONLY, unique=bool(number % 2))
            assert mapping.address % P == 0
            mapping.unmap()
    del mapping
    after = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2  # Python's own arenas come and go


def test_opening_and_mapping_over_a_service_leaves_nothing() -> None:
    # iokit/map_memory_port_leak_45265408.c, from the user client's side
    with Service("leaks") as service, BufferMemoryDescriptor(P) as buffer:
        service.share("page", buffer)
        connect("leaks").close()  # what lasts as long as the process is there now
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2_000 if LONG else 50):
            with connect("leaks") as connection:
                connection.map("page").unmap()
        del connection  # it holds its task by a descriptor
        until = time.monotonic() + 20  # the service sees each end in its own thread
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= before


def test_errors_carry_the_number_of_the_kernel() -> None:
    # IOReturn codes leak through unchanged in XNU; here errno does.
    with BufferMemoryDescriptor(P) as buffer, pytest.raises(MappingError) as caught:
        buffer.map(length=P + 1)
    assert caught.value.errno == errno.EINVAL
