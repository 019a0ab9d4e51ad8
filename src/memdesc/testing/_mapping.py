"""The mapping part of the conformance suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import ClosedError, InvalidArgument, MappingError, MappingReason, RangeError
from memdesc.testing._kind import (
    LENGTH,
    OUTSIDE,
    Kind,
    is_gone,
    locked_pages,
    pattern,
    refused,
    region,
)
from memdesc.vm.pages import Access, page_size, page_span, round_page, trunc_page
from memdesc.vm.task import Task


class MappingTests(Kind):
    """Mapping in this task, at new addresses and at lent ones."""

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, None),
            (1, None),
            (page_size - 1, 2),
            (page_size, page_size),
            (page_size + 7, 2 * page_size),
            (LENGTH - 1, 1),
            (LENGTH - 1, None),
        ],
    )
    def test_maps_any_part(self, offset: int, length: int | None) -> None:
        data = pattern(LENGTH)
        with self.new() as descriptor:
            self.put(descriptor, 0, data)
            with descriptor.map(offset=offset, length=length, unique=True) as mapping:
                nbytes = LENGTH - offset if length is None else length
                assert (mapping.offset, mapping.length, len(mapping)) == (offset, nbytes, nbytes)
                assert bytes(mapping) == data[offset : offset + nbytes]
                self._check_pages(descriptor, mapping.address, offset, nbytes)
                mapping.array()[0] = 255
                assert self.look(descriptor, offset, 1) == b"\xff"
                self.put(descriptor, offset + nbytes - 1, b"\xfe")
                assert memoryview(mapping)[-1] == 254

    def _check_pages(
        self, descriptor: MemoryDescriptor, address: int, offset: int, nbytes: int
    ) -> None:
        """Whole pages lie under the mapping, and the offset inside the page is kept."""
        start = 0
        for place, length in self.behind(descriptor):
            if start <= offset < start + length:
                assert address % page_size == (place + offset - start) % page_size
            start += length
        at, end = trunc_page(address), round_page(address + nbytes)
        while at < end:
            found = region(at)
            assert found is not None
            assert found.permissions == "rw-s"
            at = found.end

    def test_a_compatible_mapping_lends_its_address(self) -> None:
        with self.new() as descriptor, descriptor.map() as first:
            with descriptor.map() as again, descriptor.map(offset=9, length=page_size) as part:
                assert again.address == first.address
                assert (part.address, part.length) == (first.address + 9, page_size)
                with descriptor.create_mapping_in_task(first.task, reference=True) as reference:
                    assert reference.address == first.address
            with descriptor.map(unique=True) as unique:
                assert unique.address != first.address
            assert [m.address for m in descriptor.mappings()] == [first.address]

    def test_a_lent_address_stays_when_the_lender_goes(self) -> None:
        with self.new() as descriptor:
            first = descriptor.map(unique=True)
            with descriptor.map(offset=page_size) as lent:
                first.unmap()
                self.put(descriptor, page_size, b"there")
                assert bytes(memoryview(lent)[:5]) == b"there"

    def test_no_reference_to_what_is_not_there(self) -> None:
        with self.new() as descriptor, Task.current() as task:
            for how in ({}, {"offset": 1}, {"access": Access.READ_ONLY}):
                with pytest.raises(MappingError) as caught:
                    descriptor.create_mapping_in_task(task, reference=True, **how)
                assert caught.value.reason is MappingReason.NO_SUCH_MAPPING

    @pytest.mark.parametrize("offset", [0, page_size + 3])
    def test_at_a_fixed_address(self, offset: int) -> None:
        with self.new() as descriptor:
            self.put(descriptor, offset, b"fixed")
            room = _core.reserve_memory(8 * page_size)
            address = room.address + page_size
            del room
            with descriptor.map(offset=offset, at_address=address) as mapping:
                assert trunc_page(mapping.address) == address
                assert bytes(memoryview(mapping)[:5]) == b"fixed"
                assert refused(descriptor, at_address=address, unique=True) is (
                    MappingReason.ADDRESS_IN_USE
                )
                assert bytes(memoryview(mapping)[:5]) == b"fixed"
                before = region(address)
            assert is_gone(before, address)

    def test_a_fixed_address_never_overwrites(self) -> None:
        with self.new() as descriptor:
            room = _core.reserve_memory(page_size)
            # The last page of the range alone is taken.
            start = trunc_page(room.address) - 2 * page_size
            was = region(room.address)
            assert refused(descriptor, at_address=start) is MappingReason.ADDRESS_IN_USE
            assert region(room.address) == was

    def test_fixed_addresses_that_can_not_be(self) -> None:
        with self.new() as descriptor:
            for address in (page_size + 1, 0, -page_size):
                assert refused(descriptor, at_address=address) is MappingReason.ADDRESS_UNALIGNED
            assert refused(descriptor, at_address=1 << 62) is MappingReason.NO_SPACE
            assert refused(descriptor, at_address=page_size << 20, guard_pages=1) is (
                MappingReason.GUARDS_NEED_ANYWHERE
            )
            with pytest.raises(InvalidArgument):
                descriptor.map(at_address=2**63)

    @pytest.mark.parametrize("guard_pages", [1, 3])
    def test_guard_pages(self, guard_pages: int) -> None:
        with self.new() as descriptor:
            with descriptor.map(offset=5, guard_pages=guard_pages) as mapping:
                assert mapping.length == LENGTH - 5
                start, span = page_span(mapping.address, mapping.length)
                for page in range(guard_pages):
                    for address in (
                        start - (page + 1) * page_size,
                        start + span + page * page_size,
                    ):
                        found = region(address)
                        assert found is not None
                        assert found.permissions == "---p"
                with descriptor.map(guard_pages=guard_pages + 1) as other:
                    assert other.address != mapping.address - 5
            assert region(start - page_size) is None or region(start) is None
            for wrong in (-1, 1 << 21):
                with pytest.raises(InvalidArgument):
                    descriptor.map(guard_pages=wrong)

    def test_prefault_brings_all_pages_into_the_page_table(self) -> None:
        with self.new() as descriptor, descriptor.map(prefault=True, unique=True) as mapping:
            start, span = page_span(mapping.address, mapping.length)
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                entries = os.pread(pagemap.fileno(), span // page_size * 8, start // page_size * 8)
            present = [entry >> 63 for entry in memoryview(entries).cast("Q")]
            assert present == [1] * (span // page_size)

    def test_access_is_the_most_there_is_and_more_is_refused(self) -> None:
        with self.new(max_access=Access.READ_ONLY) as descriptor:
            assert descriptor.max_access is Access.READ_ONLY
            with descriptor.map(unique=True) as mapping:
                assert mapping.access is Access.READ_ONLY
                assert memoryview(mapping).readonly
                found = region(mapping.address)
                assert found is not None
                assert found.permissions == "r--s"
                self.put(descriptor, 3, b"new")
                assert bytes(memoryview(mapping)[3:6]) == b"new"
            assert refused(descriptor, access=Access.READ_WRITE) is MappingReason.ACCESS

    def test_less_access_can_be_asked_for(self) -> None:
        with self.new() as descriptor:
            assert descriptor.max_access is Access.READ_WRITE
            with descriptor.map() as writable, descriptor.map(access=Access.READ_ONLY) as readable:
                assert (writable.access, readable.access) == (Access.READ_WRITE, Access.READ_ONLY)
                assert memoryview(readable).readonly
                with pytest.raises(TypeError):
                    memoryview(readable)[0] = 1
                writable.array()[0] = 9
                assert memoryview(readable)[0] == 9

    def test_ranges_that_can_not_be(self) -> None:
        with self.new() as descriptor:
            for offset, length in [(0, 0), (LENGTH, 0), (LENGTH, None)]:
                assert refused(descriptor, offset=offset, length=length) is (
                    MappingReason.ZERO_LENGTH
                )
            for offset, length in OUTSIDE:
                assert refused(descriptor, offset=offset, length=length) is (
                    MappingReason.OUT_OF_RANGE
                )

    def test_unmapping(self) -> None:
        with self.new() as descriptor:
            mapping = descriptor.map(unique=True)
            address = mapping.address
            before = region(address)
            looks: tuple[Callable[[Any], object], ...] = (memoryview, lambda it: it.array())
            for look in looks:
                view = look(mapping)
                with pytest.raises(BufferError):
                    mapping.unmap()
                assert (mapping.is_mapped, region(address) is not None) == (True, True)
                del view
            mapping.unmap()
            mapping.unmap()  # again is a no-op
            assert (mapping.is_mapped, descriptor.mappings()) == (False, [])
            with pytest.raises(ClosedError):
                memoryview(mapping)
            assert is_gone(before, address)

    def test_leaving_the_block_never_takes_memory_from_a_view(self) -> None:
        with self.new() as descriptor:
            with descriptor.map(unique=True) as mapping:
                view = memoryview(mapping)
            assert not mapping.is_mapped
            self.put(descriptor, 0, b"alive")
            assert bytes(view[:5]) == b"alive"
            before = region(mapping.address)
            view.release()
            assert is_gone(before, mapping.address)

    def test_mappings_outlive_the_descriptor(self) -> None:
        descriptor = self.new()
        self.put(descriptor, 0, b"alive")
        mapping = descriptor.map(unique=True)
        descriptor.close()
        view = mapping.array()
        del descriptor, mapping
        gc.collect()
        assert view[:5].tobytes() == b"alive"

    def test_a_part_of_a_mapping_is_wired(self) -> None:
        with self.new() as descriptor, descriptor.map(unique=True) as mapping:
            before = locked_pages()
            with mapping.wire(trunc_page(LENGTH - 1) - 1, 2):
                assert 1 <= locked_pages() - before <= 2
            assert locked_pages() == before
            token = mapping.wire()
            assert locked_pages() > before
            with pytest.raises(RangeError):
                mapping.wire(1, LENGTH)
            mapping.unmap()
            assert token.released
            assert locked_pages() == before
