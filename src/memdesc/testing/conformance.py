"""The suite that every kind of descriptor passes. Needs pytest.

Subclass `DescriptorTests` in a test module, say how one is made and where its bytes lie, and
inherit the tests::

    from memdesc import BufferMemoryDescriptor
    from memdesc.testing.conformance import DescriptorTests

    class TestMyKind(DescriptorTests):
        def make(self, length, max_access, direction):
            return BufferMemoryDescriptor(length, max_access=max_access, direction=direction)

        def behind(self, descriptor):
            return [(descriptor.address, descriptor.length)]

Its parts (`BytesTests`, `ViewTests`, `MappingTests`, `PreparationTests`) can be inherited singly by
a kind that gives less: memory that no mapping can be made of has no `MappingTests`.

The tests look behind the descriptor by /proc/self/mem, /proc/self/maps and VmLck, never by our own
books. Every one is made inside of the test and closed there.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MappingError,
    MappingReason,
    NotPreparedError,
    RangeError,
    WiringError,
    WiringReason,
)
from memdesc.testing._kind import LENGTH, OUTSIDE, Kind, living_task, locked_pages, pattern
from memdesc.testing._mapping import MappingTests
from memdesc.vm.pages import Direction, page_size

__all__ = ["BytesTests", "DescriptorTests", "Kind", "MappingTests", "PreparationTests", "ViewTests"]


class BytesTests(Kind):
    """Length, reading and writing bytes, closing."""

    @pytest.mark.parametrize("length", [1, page_size - 1, page_size, page_size + 1, LENGTH])
    def test_describes_as_many_bytes_as_were_asked_for(self, length: int) -> None:
        with self.new(length) as descriptor:
            assert descriptor.length == len(descriptor) == length
            assert descriptor.read_bytes() == bytes(length)
            assert sum(nbytes for _, nbytes in self.behind(descriptor)) == length

    @pytest.mark.parametrize("direction", list(Direction))
    def test_keeps_its_direction(self, direction: Direction) -> None:
        with self.new(direction=direction) as descriptor:
            assert descriptor.direction is direction

    def test_reads_what_lies_in_memory(self) -> None:
        data = pattern(LENGTH)
        with self.new() as descriptor:
            self.put(descriptor, 0, data)
            assert descriptor.read_bytes() == data
            for offset in (0, 1, page_size - 1, page_size, LENGTH - 1, LENGTH):
                for length in (0, 1, 2, page_size, LENGTH - offset):
                    if offset + length <= LENGTH:
                        assert descriptor.read_bytes(offset, length) == data[offset:][:length]
                assert descriptor.read_bytes(offset) == data[offset:]

    def test_writes_what_then_lies_in_memory(self) -> None:
        with self.new() as descriptor:
            model = bytearray(LENGTH)
            for seed, (offset, length) in enumerate(
                [(0, 1), (LENGTH - 1, 1), (page_size - 1, 2), (5, 2 * page_size), (LENGTH, 0)]
            ):
                data = pattern(length, seed)
                descriptor.write_bytes(offset, data)
                model[offset : offset + length] = data
                assert self.look(descriptor, 0, LENGTH) == model

    def test_writes_any_contiguous_buffer(self) -> None:
        with self.new() as descriptor:
            table: Any = np.arange(6, dtype="<u4").reshape(2, 3)
            descriptor.write_bytes(0, table)
            descriptor.write_bytes(0, table[:0])
            assert self.look(descriptor, 0, 24) == table.tobytes()
            wrong: list[Any] = [table[:, ::2], table.T, "text", 1, None]
            for data in wrong:
                with pytest.raises(InvalidArgument):
                    descriptor.write_bytes(0, data)

    def test_nothing_is_clipped_or_wrapped(self) -> None:
        data = pattern(LENGTH)
        with self.new() as descriptor:
            self.put(descriptor, 0, data)
            for offset, length in OUTSIDE:
                with pytest.raises(RangeError) as caught:
                    descriptor.read_bytes(offset, length)
                assert caught.value.errno == errno.EINVAL
                nbytes = 1 if length is None else length
                if 0 <= nbytes <= LENGTH + 1:
                    with pytest.raises(RangeError):
                        descriptor.write_bytes(offset, bytes(nbytes))
            assert self.look(descriptor, 0, LENGTH) == data

    def test_what_is_no_offset_is_refused(self) -> None:
        offsets: list[Any] = [2**63, -(2**63), 2**64, 1.0, "1", None]
        with self.new() as descriptor:
            for offset in offsets:
                with pytest.raises(InvalidArgument):
                    descriptor.read_bytes(offset, 1)
                with pytest.raises(InvalidArgument):
                    descriptor.write_bytes(offset, b"1")

    def test_closed_gives_nothing_any_more(self) -> None:
        descriptor = self.new()
        states = [descriptor.closed]
        with descriptor:
            states.append(descriptor.closed)
        states.append(descriptor.closed)
        descriptor.close()  # again is a no-op
        assert states == [False, False, True]
        for use in (
            descriptor.read_bytes,
            lambda: descriptor.write_bytes(0, b"1"),
            lambda: memoryview(descriptor),
            descriptor.array,
            descriptor.map,
            descriptor.prepare,
            descriptor.page_counts,
        ):
            with pytest.raises(ClosedError):
                use()
        with pytest.raises(NotPreparedError):
            descriptor.complete()
        assert "closed" in repr(descriptor)

    def test_is_not_pickled(self) -> None:
        import pickle

        with self.new() as descriptor, pytest.raises(TypeError):
            pickle.dumps(descriptor)

    def test_no_mapping_in_a_task_that_has_ended(self) -> None:
        with self.new() as descriptor, living_task() as (task, child):
            child.kill()
            child.wait()
            with pytest.raises(MappingError) as caught:
                descriptor.create_mapping_in_task(task)
            assert (caught.value.reason, caught.value.errno) == (
                MappingReason.TASK_GONE,
                errno.ESRCH,
            )

    def test_no_mapping_in_a_task_without_a_connection(self) -> None:
        with self.new() as descriptor, living_task() as (task, _):
            with pytest.raises(MappingError) as caught:
                descriptor.create_mapping_in_task(task)
            assert caught.value.reason is MappingReason.NOT_CONNECTED
            with pytest.raises(MappingError) as caught:
                descriptor.create_mapping_in_task(task, connection=object())
            with pytest.raises(InvalidArgument):
                descriptor.create_mapping_in_task(task.pid)  # type: ignore[arg-type]
            assert caught.value.reason is MappingReason.NOT_CONNECTED


class ViewTests(Kind):
    """The buffer protocol and arrays."""

    def test_a_view_is_the_memory_itself(self) -> None:
        with self.new() as descriptor:
            view = memoryview(descriptor)
            assert (view.nbytes, view.format, view.ndim) == (LENGTH, "B", 1)
            self.put(descriptor, page_size - 1, b"seen")
            assert bytes(view[page_size - 1 : page_size + 3]) == b"seen"
            if not view.readonly:
                view[-2:] = b"ok"
                assert self.look(descriptor, LENGTH - 2, 2) == b"ok"
            view.release()

    def test_views_keep_the_memory_alive(self) -> None:
        # One at a time: each must keep it alone.
        looks: tuple[Callable[[Any], Any], ...] = (
            memoryview,
            lambda descriptor: descriptor.array(),
            lambda descriptor: np.frombuffer(descriptor, "u1"),
        )
        for look in looks:
            descriptor = self.new()
            self.put(descriptor, LENGTH - 4, b"last")
            view = look(descriptor)
            descriptor.close()
            del descriptor
            gc.collect()
            assert view[-4:].tobytes() == b"last"

    def test_arrays_of_any_shape(self) -> None:
        with self.new() as descriptor:
            array = descriptor.array((5, 7), "<u4", offset=9)
            assert (array.shape, array.dtype.str) == ((5, 7), "<u4")
            self.put(descriptor, 9 + 4, (1234).to_bytes(4, "little"))
            assert array[0, 1] == 1234
            assert descriptor.array(3, "<u2", order="F").shape == (3,)
            assert descriptor.array(dtype="<u8").shape == (LENGTH // 8,)
            assert descriptor.array((0, 4)).shape == (0, 4)

    def test_arrays_that_do_not_fit_are_refused(self) -> None:
        with self.new() as descriptor:
            sizes: list[tuple[int | tuple[int, ...], int]] = [
                (LENGTH + 1, 0),
                (LENGTH, 1),
                ((2**40, 2**40), 0),
                (1, LENGTH + 1),
            ]
            for shape, offset in sizes:
                with pytest.raises(RangeError):
                    descriptor.array(shape, offset=offset)
            wrongs: list[dict[str, Any]] = [{"shape": (-1,)}, {"dtype": "O"}, {"order": "K"}]
            for wrong in wrongs:
                with pytest.raises(InvalidArgument):
                    descriptor.array(**wrong)

    def test_page_counts(self) -> None:
        with self.new() as descriptor:
            descriptor.write_bytes(0, bytes(LENGTH))
            counts = descriptor.page_counts()
            assert counts.total == self.pages_behind(descriptor)
            assert (LENGTH - 1) // page_size < counts.resident <= counts.total


class PreparationTests(Kind):
    """prepare and complete: counted, nested as in XNU, and true of the kernel's own count."""

    def test_wires_while_prepared(self) -> None:
        with self.new() as descriptor:
            before = locked_pages()
            descriptor.prepare()
            assert locked_pages() - before == self.pages_behind(descriptor)
            assert descriptor.page_counts().resident == self.pages_behind(descriptor)
            descriptor.prepare()
            assert descriptor.prepare_count == 2
            descriptor.complete()
            assert locked_pages() - before == self.pages_behind(descriptor)
            descriptor.complete()
            assert (descriptor.prepare_count, locked_pages()) == (0, before)

    def test_too_many_completes_are_an_error(self) -> None:
        with self.new() as descriptor:
            before = locked_pages()
            with pytest.raises(NotPreparedError):
                descriptor.complete()
            descriptor.prepare()
            descriptor.complete()
            with pytest.raises(NotPreparedError):
                descriptor.complete()
            with descriptor.prepared():
                assert descriptor.prepare_count == 1
            assert (descriptor.prepare_count, locked_pages()) == (0, before)

    @pytest.mark.parametrize("second", [d for d in Direction if d is not Direction.OUT])
    def test_prepared_for_reading_is_not_prepared_for_writing(self, second: Direction) -> None:
        # XNU: kIOReturnNotWritable and the count unchanged (IOMemoryDescriptor.cpp:4143).
        with self.new() as descriptor:
            before = locked_pages()
            descriptor.prepare(Direction.OUT)
            with pytest.raises(WiringError) as caught:
                descriptor.prepare(second)
            assert caught.value.reason is WiringReason.NOT_WRITABLE
            with pytest.raises(WiringError) as caught:
                descriptor.write_bytes(0, b"1")
            assert caught.value.reason is WiringReason.NOT_WRITABLE
            descriptor.prepare(Direction.OUT)
            assert descriptor.prepare_count == 2
            descriptor.complete()
            descriptor.complete()
            assert locked_pages() == before
            descriptor.write_bytes(0, b"1")
            assert self.look(descriptor, 0, 1) == b"1"

    def test_prepared_for_writing_is_prepared_for_reading_too(self) -> None:
        with self.new(direction=Direction.IN) as descriptor:
            descriptor.prepare()
            descriptor.prepare(Direction.OUT)
            descriptor.complete()
            descriptor.write_bytes(0, b"1")
            descriptor.complete()

    def test_its_own_direction_counts_unless_another_is_said(self) -> None:
        with self.new(direction=Direction.OUT) as descriptor:
            with descriptor.prepared(), pytest.raises(WiringError):
                descriptor.prepare(Direction.IN)
            with descriptor.prepared(Direction.IN):
                descriptor.prepare()
                descriptor.complete()

    @pytest.mark.parametrize("how", ["closed", "dropped"])
    def test_what_is_still_prepared_is_completed_in_the_end(self, how: str) -> None:
        descriptor = self.new()
        before = locked_pages()
        descriptor.prepare()
        descriptor.prepare()
        if how == "closed":
            descriptor.close()
        del descriptor
        gc.collect()
        assert locked_pages() == before

    def test_does_not_map_and_mapping_does_not_wire(self) -> None:
        with self.new() as descriptor:
            before = locked_pages()
            descriptor.prepare()
            assert descriptor.mappings() == []
            descriptor.complete()
            assert locked_pages() == before


class DescriptorTests(BytesTests, ViewTests, MappingTests, PreparationTests):
    """All of them: what memory that can be shared must pass."""
