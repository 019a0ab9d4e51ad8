"""Snapshots pass the suite that every kind of descriptor passes, but for what stores.

What a test of the suite would store, the source held already when the snapshot was taken; what
is left out by name stores through the descriptor, or prepares it for that.
"""

from __future__ import annotations

import os

import pytest

from memdesc import Access, BufferMemoryDescriptor, Direction, MemoryDescriptor, page_size
from memdesc.testing import conformance as suite
from memdesc.testing._kind import LENGTH, pattern

Runs = list[tuple[int, int]]

FILLED = {
    "test_reads_what_lies_in_memory": pattern(LENGTH),
    "test_nothing_is_clipped_or_wrapped": pattern(LENGTH),
    "test_a_view_is_the_memory_itself": bytes(page_size - 1) + b"seen",
    "test_views_keep_the_memory_alive": bytes(LENGTH - 4) + b"last",
    "test_arrays_of_any_shape": bytes(13) + (1234).to_bytes(4, "little"),
    "test_a_lent_address_stays_when_the_lender_goes": bytes(page_size) + b"there",
    "test_at_a_fixed_address[0]": b"fixed",
    f"test_at_a_fixed_address[{page_size + 3}]": bytes(page_size + 3) + b"fixed",
    "test_access_is_the_most_there_is_and_more_is_refused": bytes(3) + b"new",
    "test_leaving_the_block_never_takes_memory_from_a_view": b"alive",
    "test_mappings_outlive_the_descriptor": b"alive",
}


class Snapshots(suite.DescriptorTests):
    @pytest.fixture(autouse=True)
    def fill(self, request: pytest.FixtureRequest) -> None:
        self.content = FILLED.get(request.node.name, b"")

    def source(self, length: int) -> MemoryDescriptor:
        raise NotImplementedError

    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        source = self.source(length)
        source.write_bytes(0, self.content)
        return source.snapshot()

    def behind(self, descriptor: MemoryDescriptor) -> Runs:
        return [(descriptor.address, descriptor.length)]  # type: ignore[attr-defined]

    def put(self, descriptor: MemoryDescriptor, offset: int, data: bytes) -> None:
        assert self.look(descriptor, offset, len(data)) == data

    def test_page_counts(self) -> None:
        with self.new() as descriptor:
            bytes(memoryview(descriptor))
            counts = descriptor.page_counts()
            assert counts.total == counts.resident == self.pages_behind(descriptor)

    test_writes_what_then_lies_in_memory = None  # type: ignore[assignment]
    test_writes_any_contiguous_buffer = None  # type: ignore[assignment]
    test_keeps_its_direction = None  # type: ignore[assignment]
    test_maps_any_part = None  # type: ignore[assignment]
    test_less_access_can_be_asked_for = None  # type: ignore[assignment]
    test_prepared_for_reading_is_not_prepared_for_writing = None  # type: ignore[assignment]
    test_prepared_for_writing_is_prepared_for_reading_too = None  # type: ignore[assignment]
    test_its_own_direction_counts_unless_another_is_said = None  # type: ignore[assignment]

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, None), (1, None), (page_size - 1, 2), (LENGTH - 1, 1)]
    )
    def test_maps_any_part_for_reading(self, offset: int, length: int | None) -> None:
        self.content = data = pattern(LENGTH)
        with self.new() as descriptor:
            with descriptor.map(offset=offset, length=length, unique=True) as mapping:
                assert bytes(mapping) == data[offset:][: mapping.length]
                assert mapping.access is Access.READ_ONLY
                assert memoryview(mapping).readonly


class TestFreeSnapshot(Snapshots):
    def source(self, length: int) -> MemoryDescriptor:
        return BufferMemoryDescriptor(length)


class TestCopiedSnapshot(Snapshots):
    def source(self, length: int) -> MemoryDescriptor:
        buffer = BufferMemoryDescriptor(length)
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        return buffer


class TestSnapshotOfChanges(Snapshots):
    """Several extents, of two objects."""

    def source(self, length: int) -> MemoryDescriptor:
        buffer = BufferMemoryDescriptor(length)
        buffer.snapshot().close()
        return buffer


class TestSnapshotOfAPart(Snapshots):
    def source(self, length: int) -> MemoryDescriptor:
        from memdesc import SubMemoryDescriptor

        return SubMemoryDescriptor(BufferMemoryDescriptor(length + 9), 5, length)
