"""What only a part has: its parent."""

from __future__ import annotations

import errno
import gc
from typing import Any

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    ClosedError,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    RangeError,
    SubMemoryDescriptor,
    WiringError,
    WiringReason,
    page_size,
)
from memdesc.testing._kind import locked_pages


@pytest.fixture
def whole() -> Any:
    with BufferMemoryDescriptor(10 * page_size, name="whole", direction=Direction.IN) as buffer:
        yield buffer


def test_defaults_are_the_parents(whole: BufferMemoryDescriptor) -> None:
    part = SubMemoryDescriptor(whole, 100)
    assert (part.offset, part.length) == (100, 10 * page_size - 100)
    assert (part.direction, part.name, part.max_access) == (
        Direction.IN,
        "whole",
        Access.READ_ONLY,
    )
    assert SubMemoryDescriptor(whole, 0, 1, Direction.OUT).direction is Direction.OUT


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 10 * page_size + 1),
        (10 * page_size, 1),
        (10 * page_size + 1, None),
        (-1, 1),
        (1, -1),
        (2**63 - 1, 2**63 - 1),  # XNU: offset + length is not checked for wrapping
        (1, 2**63 - 1),
    ],
)
def test_no_part_leaves_its_parent(
    whole: BufferMemoryDescriptor, offset: int, length: int | None
) -> None:
    with pytest.raises(RangeError) as caught:
        SubMemoryDescriptor(whole, offset, length)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("wrong", [2**64, 1.0, "1", None])
def test_what_is_no_range(whole: BufferMemoryDescriptor, wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        SubMemoryDescriptor(whole, wrong, 1)


def test_an_empty_part_is_described_but_not_mapped(whole: BufferMemoryDescriptor) -> None:
    part = SubMemoryDescriptor(whole, 10 * page_size, 0)
    assert (part.length, part.read_bytes()) == (0, b"")
    with pytest.raises(MappingError) as caught:
        part.map()
    assert caught.value.reason is MappingReason.ZERO_LENGTH


def test_a_part_keeps_its_parent() -> None:
    part = SubMemoryDescriptor(BufferMemoryDescriptor(100), 10, 20)
    gc.collect()
    part.write_bytes(0, b"kept")
    assert part.parent.read_bytes(10, 4) == b"kept"


def test_a_part_writes_as_its_owner_may(whole: BufferMemoryDescriptor) -> None:
    # max_access is what others get; the part of a buffer is its owner's too.
    part = SubMemoryDescriptor(whole, page_size - 2, 4)
    memoryview(part)[:] = b"edge"
    assert whole.read_bytes(page_size - 2, 4) == b"edge"


def test_parts_overlap(whole: BufferMemoryDescriptor) -> None:
    left, right = SubMemoryDescriptor(whole, 0, 10), SubMemoryDescriptor(whole, 5, 10)
    left.write_bytes(5, b"12345")
    assert right.read_bytes(0, 5) == b"12345"


def test_preparing_a_part_prepares_the_whole(whole: BufferMemoryDescriptor) -> None:
    # XNU: every operation goes to the parent (IOSubMemoryDescriptor.cpp).
    before = locked_pages()
    first, second = SubMemoryDescriptor(whole, 0, 1), SubMemoryDescriptor(whole, 5, 1)
    first.prepare()
    first.prepare()
    second.prepare()
    assert (whole.prepare_count, locked_pages() - before) == (2, 10)
    assert first.page_counts() == whole.page_counts()
    first.complete()
    first.complete()
    second.close()
    assert (whole.prepare_count, locked_pages()) == (0, before)


def test_a_part_that_is_dropped_completes_its_parent(whole: BufferMemoryDescriptor) -> None:
    before = locked_pages()
    part = SubMemoryDescriptor(whole, 0, 1)
    part.prepare()
    assert whole.prepare_count == 1
    del part
    gc.collect()
    assert (whole.prepare_count, locked_pages()) == (0, before)


def test_a_parent_closed_first_leaves_nothing_wired(whole: BufferMemoryDescriptor) -> None:
    before = locked_pages()
    part = SubMemoryDescriptor(whole, 0, 1)
    part.prepare()
    whole.close()
    assert locked_pages() == before
    part.complete()
    for use in (part.read_bytes, part.map, part.prepare, part.page_counts, part.array):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(ClosedError):
        part.write_bytes(0, b"1")


def test_the_rules_of_preparing_hold_through_the_parent(whole: BufferMemoryDescriptor) -> None:
    part = SubMemoryDescriptor(whole, 0, 10)
    with whole.prepared(Direction.OUT):
        with pytest.raises(WiringError) as caught:
            part.prepare(Direction.IN)
        assert caught.value.reason is WiringReason.NOT_WRITABLE
        assert part.prepare_count == 0
        with pytest.raises(WiringError):
            part.write_bytes(0, b"1")
    part.write_bytes(0, b"1")


def test_a_parent_that_was_shortened(whole: BufferMemoryDescriptor) -> None:
    part = SubMemoryDescriptor(whole, page_size, page_size)
    mapping = part.map()
    whole.set_length(2 * page_size)
    assert part.read_bytes() == bytes(page_size)
    whole.set_length(2 * page_size - 1)
    for use in (part.read_bytes, part.array, lambda: part.map(unique=True)):
        with pytest.raises(RangeError):
            use()
    with pytest.raises(RangeError):
        part.write_bytes(0, b"1")
    assert mapping.length == page_size
    whole.set_length(whole.capacity)
    assert part.read_bytes() == bytes(page_size)


def test_a_complete_too_many_of_the_parent_is_not_made_up_by_the_part(
    whole: BufferMemoryDescriptor,
) -> None:
    before = locked_pages()
    with SubMemoryDescriptor(whole, 0, 1) as part:
        part.prepare()
        whole.complete()  # was not the caller's to complete
        part.complete()
        part.prepare()
        whole.complete()
    assert (part.closed, whole.prepare_count, locked_pages()) == (True, 0, before)


def test_a_closed_part_is_no_way_to_the_whole(whole: BufferMemoryDescriptor) -> None:
    part = SubMemoryDescriptor(whole, 0, 100)
    inner = SubMemoryDescriptor(part, 10, 20)
    part.close()
    for use in (inner.read_bytes, inner.map, inner.prepare):
        with pytest.raises(ClosedError):
            use()
    assert whole.read_bytes(0, 1) == b"\0"
