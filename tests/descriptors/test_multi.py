"""What only several as one have: members, and the borders between them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    ClosedError,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    SealedError,
    SubMemoryDescriptor,
    WiringError,
    WiringReason,
    page_size,
)
from memdesc.testing import failing
from memdesc.testing._kind import locked_pages

P = page_size


def filled(length: int, byte: bytes, access: Access = Access.READ_ONLY) -> BufferMemoryDescriptor:
    buffer = BufferMemoryDescriptor(length, max_access=access, name=byte.decode())
    buffer.write_bytes(0, byte * length)
    return buffer


@pytest.fixture
def abc() -> Iterator[list[BufferMemoryDescriptor]]:
    members = [filled(P, b"a"), filled(2 * P, b"b"), filled(3 * P, b"c")]
    yield members
    for member in members:
        member.close()


def test_of_no_members_describes_nothing() -> None:
    with pytest.raises(InvalidArgument):
        MultiMemoryDescriptor([])


def test_defaults(abc: list[BufferMemoryDescriptor]) -> None:
    several = MultiMemoryDescriptor(abc)
    assert (several.length, several.name, several.direction) == (6 * P, "a+b+c", Direction.OUT_IN)
    assert MultiMemoryDescriptor(abc, Direction.OUT).direction is Direction.OUT
    assert MultiMemoryDescriptor([*abc, *abc]).name == "a+b+c+…"


def test_gives_no_more_than_the_least_of_its_members() -> None:
    readable, writable = filled(P, b"r"), filled(P, b"w", Access.READ_WRITE)
    assert MultiMemoryDescriptor([writable, writable]).max_access is Access.READ_WRITE
    both = MultiMemoryDescriptor([writable, readable])
    assert both.max_access is Access.READ_ONLY
    with pytest.raises(MappingError) as caught:
        both.map(access=Access.READ_WRITE)
    assert caught.value.reason is MappingReason.ACCESS


def test_one_contiguous_view_of_all(abc: list[BufferMemoryDescriptor]) -> None:
    with MultiMemoryDescriptor(abc).map() as mapping:
        assert bytes(mapping) == b"a" * P + b"bb" * P + b"ccc" * P


def test_the_same_member_twice_is_the_same_memory_twice() -> None:
    buffer = filled(P, b"x", Access.READ_WRITE)
    with MultiMemoryDescriptor([buffer, buffer]).map() as mapping:
        mapping.array()[0] = 1
        assert mapping.array()[P] == 1
    before = locked_pages()
    twice = MultiMemoryDescriptor([buffer, buffer])
    twice.prepare()
    assert (buffer.prepare_count, locked_pages() - before) == (2, 1)
    twice.complete()
    assert (buffer.prepare_count, locked_pages()) == (0, before)


@pytest.mark.parametrize(
    "sizes", [(P + 1, P), (P, P - 1, P), (1, 1)], ids=["first", "inner", "tiny"]
)
def test_borders_inside_pages_can_not_be_mapped(sizes: tuple[int, ...]) -> None:
    # XNU: IOMultiMemoryDescriptor maps the members at running addresses, so that one that is no
    # page multiple is overwritten in part by the next; here it is refused.
    members = [filled(size, bytes([65 + i])) for i, size in enumerate(sizes)]
    several = MultiMemoryDescriptor(members)
    with pytest.raises(MappingError) as caught:
        several.map()
    assert caught.value.reason is MappingReason.NOT_CONGRUENT
    with pytest.raises(MappingError):
        memoryview(several)
    # Reading and writing asks for nothing of the kind.
    assert several.read_bytes() == b"".join(m.read_bytes() for m in members)
    several.write_bytes(sizes[0] - 1, b"()")
    assert (members[0].read_bytes(sizes[0] - 1), members[1].read_bytes(0, 1)) == (b"(", b")")
    # And a range within one member maps.
    with several.map(offset=sizes[0], length=1) as mapping:
        assert bytes(mapping) == b")"


def test_a_part_that_begins_inside_a_page_can_only_be_the_first() -> None:
    whole = filled(2 * P, b"w")
    part = SubMemoryDescriptor(whole, 10, P - 10)
    assert MultiMemoryDescriptor([part, whole]).map().length == 3 * P - 10
    with pytest.raises(MappingError) as caught:
        MultiMemoryDescriptor([whole, part]).map()
    assert caught.value.reason is MappingReason.NOT_CONGRUENT


def test_private_memory_among_the_members() -> None:
    private = MemoryDescriptor.with_buffer(bytearray(b"p" * P), Direction.OUT)
    several = MultiMemoryDescriptor([filled(P, b"s"), private])
    assert several.read_bytes(P - 1, 2) == b"sp"
    with pytest.raises(MappingError) as caught:
        several.map()
    assert caught.value.reason is MappingReason.PRIVATE_MEMORY


def test_empty_members_are_passed_over(abc: list[BufferMemoryDescriptor]) -> None:
    empty = SubMemoryDescriptor(abc[0], 5, 0)
    several = MultiMemoryDescriptor([empty, abc[0], empty, abc[1], empty])
    assert bytes(several.map()) == b"a" * P + b"bb" * P
    assert MultiMemoryDescriptor([empty, empty]).read_bytes() == b""


def test_a_view_follows_members_whose_length_moves() -> None:
    left, right = BufferMemoryDescriptor(2 * P), BufferMemoryDescriptor(2 * P)
    left.write_bytes(0, b"l" * 2 * P)
    right.write_bytes(0, b"r" * 2 * P)
    nested = MultiMemoryDescriptor([MultiMemoryDescriptor([left, right])])
    right.set_length(P)
    assert bytes(nested) == b"ll" * P + b"r" * P
    left.set_length(P)
    right.set_length(2 * P)  # as long as before, but other bytes
    assert bytes(nested) == b"l" * P + b"rr" * P


def test_preparing_prepares_all_or_none(abc: list[BufferMemoryDescriptor]) -> None:
    before = locked_pages()
    several = MultiMemoryDescriptor(abc)
    several.prepare()
    assert [member.prepare_count for member in abc] == [1, 1, 1]
    assert locked_pages() - before == 6
    several.complete()
    with failing("mlock", 12, after=2), pytest.raises(WiringError):
        several.prepare()
    assert [member.prepare_count for member in abc] == [0, 0, 0]
    abc[2].prepare(Direction.OUT)
    with pytest.raises(WiringError) as caught:
        several.prepare()
    assert caught.value.reason is WiringReason.NOT_WRITABLE
    assert [member.prepare_count for member in abc] == [0, 0, 1]
    assert locked_pages() - before == 3
    abc[2].complete()


def test_completing_when_a_member_was_closed(abc: list[BufferMemoryDescriptor]) -> None:
    before = locked_pages()
    several = MultiMemoryDescriptor(abc)
    several.prepare()
    abc[1].close()
    assert locked_pages() - before == 4
    several.complete()
    assert [member.prepare_count for member in abc] == [0, 0, 0]
    assert locked_pages() == before


def test_dropped_it_completes_its_members(abc: list[BufferMemoryDescriptor]) -> None:
    several = MultiMemoryDescriptor(abc)
    several.prepare()
    del several
    gc.collect()
    assert [member.prepare_count for member in abc] == [0, 0, 0]


def test_a_closed_member_closes_the_way_to_all(abc: list[BufferMemoryDescriptor]) -> None:
    several = MultiMemoryDescriptor(abc)
    view = memoryview(several)
    abc[1].close()
    for use in (several.read_bytes, several.array, several.prepare, several.page_counts):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(ClosedError):
        several.map(unique=True)
    assert [member.prepare_count for member in abc] == [0, 0, 0]
    assert several.read_bytes(0, P) == b"a" * P  # of the members that are open
    assert bytes(view[3 * P : 3 * P + 1]) == b"c"  # what was given stays


def test_writing_nothing_where_a_part_can_not_be_written(abc: list[BufferMemoryDescriptor]) -> None:
    readable = MemoryDescriptor.with_buffer(b"r" * P, Direction.OUT)
    several = MultiMemoryDescriptor([abc[0], readable])
    with pytest.raises(SealedError):
        several.write_bytes(P - 1, b"12")
    with abc[1].prepared(Direction.OUT):
        with pytest.raises(WiringError):
            MultiMemoryDescriptor(abc).write_bytes(P - 1, b"12")
    assert abc[0].read_bytes() == b"a" * P
