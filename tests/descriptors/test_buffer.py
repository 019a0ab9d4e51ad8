"""What only a buffer has: capacity and length, reservation, wiring at birth, its pages."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from children import in_child, limit_locking
from huge_pool import free_pages, huge_pages

from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MultiMemoryDescriptor,
    PageKind,
    RangeError,
    SealedError,
    SubMemoryDescriptor,
    Task,
    WiringError,
    WiringReason,
    _core,
    page_size,
)
from memdesc.testing import failing, leak_guard
from memdesc.testing._kind import locked_pages, region

# ── How it is made ───────────────────────────────────────────────────────────────────────────


def test_defaults() -> None:
    with BufferMemoryDescriptor(100) as buffer:
        assert (buffer.capacity, buffer.length) == (100, 100)
        assert buffer.direction is Direction.OUT_IN
        assert buffer.max_access is Access.READ_ONLY
        assert buffer.pages is PageKind.AUTO
        assert buffer.page_kind is PageKind.BASE  # less than one huge page
        assert buffer.prepare_count == 0
        assert not memoryview(buffer).readonly  # the owner's own view


def test_the_name_is_in_the_maps_file() -> None:
    with BufferMemoryDescriptor(100, name="frames of camera 0") as buffer:
        found = region(buffer.address)
        assert found is not None
        assert found.path == "/memfd:frames of camera 0 (deleted)"


@pytest.mark.parametrize("name", ["a\0b", "n" * 250, "ä" * 125])
def test_names_that_a_memfd_can_not_have(name: str) -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, name=name)


@pytest.mark.parametrize("name", ["", "n" * 249, "ä" * 124, "a/b\nc"])
def test_names_that_a_memfd_can_have(name: str) -> None:
    with BufferMemoryDescriptor(1, name=name) as buffer:
        found = region(buffer.address)
        assert found is not None
        assert found.object.name == name


@pytest.mark.parametrize("capacity", [0, -1, -(2**63), 2**63, 2**64, 2**64 - 1, 1.5, "9", None])
def test_capacities_that_can_not_be(capacity: Any) -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(capacity)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("capacity", [2**63 - 1, 2**63 - page_size, 2**62, 2**48])
def test_capacities_that_no_machine_has(capacity: int, lazy: bool) -> None:
    with pytest.raises((AllocationError, InvalidArgument)) as caught:
        BufferMemoryDescriptor(capacity, lazy=lazy)
    if capacity < 2**63 - page_size:
        assert isinstance(caught.value, AllocationError)
        assert caught.value.errno in (errno.ENOMEM, errno.EFBIG)
        assert (caught.value.requested or 0) >= capacity


def test_numpys_integers_are_integers() -> None:
    import numpy as np

    with BufferMemoryDescriptor(np.int64(100), alignment=np.uint32(1 << 16)) as buffer:
        assert (buffer.length, type(buffer.length)) == (100, int)
        buffer.set_length(np.int16(50))
        assert buffer.read_bytes(np.uint8(1), np.int8(2)) == bytes(2)
        with buffer.map(offset=np.int64(1), length=np.int64(3)) as mapping:
            assert mapping.length == 3
        with SubMemoryDescriptor(buffer, np.int64(10), np.int64(20)) as part:
            assert part.length == 20


@pytest.mark.parametrize("alignment", [1, 16, page_size, 1 << 16, 2 << 20, 1 << 30])
def test_alignment_of_the_owners_view(alignment: int) -> None:
    with BufferMemoryDescriptor(5000, alignment=alignment) as buffer:
        assert buffer.address % max(alignment, page_size) == 0
        buffer.write_bytes(4999, b"!")
        assert buffer.read_bytes(4999) == b"!"


@pytest.mark.parametrize("alignment", [0, -1, 3, page_size + 1, 1 << 41, 2**63, 1.0, None])
def test_alignments_that_can_not_be(alignment: Any) -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, alignment=alignment)


# ── Capacity and length ──────────────────────────────────────────────────────────────────────


def test_length_moves_within_the_capacity() -> None:
    with BufferMemoryDescriptor(5000) as buffer:
        buffer.write_bytes(0, bytes(range(250)) * 20)
        buffer.set_length(100)
        assert (buffer.length, buffer.capacity, len(memoryview(buffer))) == (100, 5000, 100)
        with pytest.raises(RangeError):
            buffer.read_bytes(0, 101)
        buffer.set_length(5000)
        assert buffer.read_bytes(4999) == b"\xf9"  # no memory changed
        buffer.set_length(0)
        assert (buffer.read_bytes(), bytes(buffer)) == (b"", b"")
        with pytest.raises(MappingError) as caught:
            buffer.map()
        assert caught.value.reason is MappingReason.ZERO_LENGTH


@pytest.mark.parametrize("length", [-1, 101, page_size, 2**63 - 1])
def test_a_length_past_the_capacity_is_an_error(length: int) -> None:
    # XNU ignores it silently (IOBufferMemoryDescriptor.cpp:791).
    with BufferMemoryDescriptor(100) as buffer:
        buffer.set_length(50)
        with pytest.raises(RangeError) as caught:
            buffer.set_length(length)
        assert (caught.value.errno, buffer.length) == (errno.EINVAL, 50)


def test_mappings_and_views_stay_as_they_are_when_the_length_moves() -> None:
    with BufferMemoryDescriptor(5000) as buffer, buffer.map() as mapping:
        view = memoryview(buffer)
        buffer.set_length(10)
        assert (view.nbytes, mapping.length) == (5000, 5000)
        view[4999] = 7
        assert memoryview(mapping)[4999] == 7


def test_appended_bytes_lengthen() -> None:
    with BufferMemoryDescriptor(10) as buffer:
        buffer.set_length(0)
        for data in (b"abc", b"", memoryview(b"d"), bytearray(b"efghij")):
            buffer.append_bytes(data)
        assert buffer.read_bytes() == b"abcdefghij"


def test_what_does_not_fit_is_not_appended() -> None:
    # XNU copies what fits and says success (IOBufferMemoryDescriptor.cpp:827).
    with BufferMemoryDescriptor(10) as buffer:
        buffer.set_length(8)
        with pytest.raises(RangeError) as caught:
            buffer.append_bytes(b"123")
        assert (caught.value.errno, buffer.length) == (errno.EINVAL, 8)
        buffer.set_length(10)
        assert buffer.read_bytes() == bytes(10)
        with pytest.raises(InvalidArgument):
            buffer.append_bytes("text")  # type: ignore[arg-type]
        buffer.set_length(0)
        buffer.prepare(Direction.OUT)
        with pytest.raises(WiringError):
            buffer.append_bytes(b"1")
        assert buffer.length == 0


def test_the_rest_of_the_last_page_is_zero_and_in_no_view() -> None:
    with BufferMemoryDescriptor(page_size + 5) as buffer:
        buffer.write_bytes(0, b"\xff" * (page_size + 5))
        assert memoryview(buffer).nbytes == page_size + 5
        assert os.fstat(buffer.memory.fileno()).st_size == 2 * page_size
        with buffer.map(unique=True) as mapping, Task.current() as task:
            assert memoryview(mapping).nbytes == page_size + 5
            end = mapping.address + page_size + 5
            with open(task.proc_path("mem"), "rb", buffering=0) as memory:
                assert os.pread(memory.fileno(), page_size - 5, end) == bytes(page_size - 5)


# ── Who may do what ──────────────────────────────────────────────────────────────────────────


def test_the_owner_writes_after_the_memory_was_granted_read_only() -> None:
    with BufferMemoryDescriptor(100) as buffer:
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        buffer.write_bytes(0, b"owner")
        with buffer.map(unique=True) as mapping:
            assert bytes(mapping)[:5] == b"owner"
            with pytest.raises(PermissionError):  # the kernel: F_SEAL_FUTURE_WRITE
                _core.mprotect(mapping.address, page_size, _core.PROT_READ | _core.PROT_WRITE)


def test_read_write_memory_is_not_given_read_only_unless_as_a_courtesy() -> None:
    with BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer:
        with pytest.raises(SealedError) as caught:
            buffer.memory.grant(Access.READ_ONLY, user=os.geteuid())
        assert caught.value.errno == errno.EPERM
        os.close(buffer.memory.grant(Access.READ_ONLY, enforced=False, user=os.geteuid()))
        os.close(buffer.memory.grant(Access.READ_WRITE, user=os.geteuid()))


# ── Reserved, lazy, wired ────────────────────────────────────────────────────────────────────


def test_all_pages_are_there_from_the_start_unless_lazy() -> None:
    with BufferMemoryDescriptor(8 * page_size) as buffer:
        assert (buffer.page_counts().total, buffer.page_counts().resident) == (8, 8)
    with BufferMemoryDescriptor(8 * page_size, lazy=True) as buffer:
        assert (buffer.page_counts().total, buffer.page_counts().resident) == (8, 0)
        buffer.write_bytes(3 * page_size, b"1")
        assert buffer.page_counts().resident == 1
        with buffer.prepared():
            assert buffer.page_counts().resident == 8


def test_more_than_there_is_is_refused_before_anything_is_taken() -> None:
    from memdesc.memory.limits import available

    there = available().nbytes
    with pytest.raises(AllocationError) as caught:
        BufferMemoryDescriptor(2 * there)
    assert caught.value.errno == errno.ENOMEM
    assert (caught.value.requested or 0) >= 2 * there > (caught.value.available or 0) > 0


@pytest.mark.parametrize(
    ("call", "number"),
    [("fallocate", errno.ENOSPC), ("fallocate", errno.ENOMEM), ("madvise", errno.EFAULT)],
)
def test_what_the_kernel_refuses_leaves_nothing(call: str, number: int) -> None:
    with leak_guard():
        with failing(call, number) as fault, pytest.raises(AllocationError) as caught:
            BufferMemoryDescriptor(3 * page_size)
        assert (fault.failures, caught.value.errno) == (1, number)
        del caught


def test_without_descriptors_left() -> None:
    def exhausted() -> tuple[str, int | None]:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            BufferMemoryDescriptor(1)
        except AllocationError as error:
            return type(error).__name__, error.errno
        return "made", None

    assert in_child(exhausted) == ("AllocationError", errno.EMFILE)


def test_wired_from_birth() -> None:
    before = locked_pages()
    with BufferMemoryDescriptor(3 * page_size + 1, wired=True) as buffer:
        assert (buffer.prepare_count, locked_pages() - before) == (1, 4)
        buffer.set_length(1)
        assert locked_pages() - before == 4
        with buffer.prepared():
            assert buffer.prepare_count == 2
        assert locked_pages() - before == 4
    assert locked_pages() == before


def test_what_can_not_be_wired_is_not_allocated() -> None:
    with leak_guard():
        with failing("mlock", errno.ENOMEM), pytest.raises(WiringError) as caught:
            BufferMemoryDescriptor(3 * page_size, wired=True)
        assert caught.value.errno == errno.ENOMEM
        del caught


def test_wiring_past_the_limit() -> None:
    def limited() -> WiringReason:
        limit_locking(2 * page_size)
        with leak_guard():
            try:
                BufferMemoryDescriptor(3 * page_size, wired=True)
            except WiringError as error:
                reason = error.reason
        return reason

    assert in_child(limited) is WiringReason.LIMIT


# ── Huge pages ───────────────────────────────────────────────────────────────────────────────

HUGE = PageKind.HUGE.page_size


@pytest.fixture
def huge_pool() -> Iterator[None]:
    """Four huge pages in the pool, or skip; the pool is put back."""
    with huge_pages(4):
        yield
        gc.collect()


@pytest.mark.alone
def test_huge_pages(huge_pool: None) -> None:
    with BufferMemoryDescriptor(HUGE + 1, pages=PageKind.HUGE) as buffer:
        assert buffer.address % HUGE == 0
        assert os.fstat(buffer.memory.fileno()).st_size == 2 * HUGE
        buffer.write_bytes(HUGE, b"!")
        before = locked_pages()
        with buffer.prepared():  # never paged out anyway, and not counted by VmLck
            assert locked_pages() == before
        with buffer.map(offset=HUGE - 1, prefault=True, unique=True) as mapping:
            assert bytes(mapping) == b"\0!"
            assert mapping.address % HUGE == HUGE - 1
        with buffer.map(offset=5, length=1, guard_pages=1) as mapping:
            guard = region(mapping.address - 5 - page_size)
            assert mapping.address % HUGE == 5
            assert guard is not None
            assert guard.permissions == "---p"
        assert buffer.page_counts().resident == buffer.page_counts().total


@pytest.mark.alone
def test_an_exhausted_pool_is_an_error_at_creation(huge_pool: None) -> None:
    with BufferMemoryDescriptor(3 * HUGE, pages=PageKind.HUGE):
        with pytest.raises(AllocationError) as caught:
            BufferMemoryDescriptor(1000 * HUGE, pages=PageKind.HUGE)
        assert caught.value.errno == errno.ENOMEM
        there = caught.value.available
        assert caught.value.requested == 1000 * HUGE
        assert there is not None
        assert (there % HUGE, there < 1000 * HUGE) == (0, True)


def test_an_empty_pool_is_an_error_at_creation() -> None:
    if free_pages():
        pytest.skip("the pool of huge pages is not empty")
    with pytest.raises(AllocationError) as caught:
        BufferMemoryDescriptor(1, pages=PageKind.HUGE)
    assert caught.value.errno in (errno.ENOMEM, errno.EINVAL)


def test_huge_memory_is_not_shared_for_writing() -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, pages=PageKind.HUGE, max_access=Access.READ_WRITE)


@pytest.mark.alone
def test_base_and_huge_pages_in_one_view(huge_pool: None) -> None:
    huge = BufferMemoryDescriptor(HUGE, pages=PageKind.HUGE)
    base = BufferMemoryDescriptor(page_size)
    huge.write_bytes(HUGE - 1, b"a")
    base.write_bytes(0, b"b")
    with MultiMemoryDescriptor([huge, base]) as both:
        assert both.read_bytes(HUGE - 1, 2) == b"ab"
        with both.map() as mapping:
            assert memoryview(mapping)[HUGE - 1 : HUGE + 1].tobytes() == b"ab"
    with MultiMemoryDescriptor([base, huge]) as both, pytest.raises(MappingError) as caught:
        both.map()
    assert caught.value.reason is MappingReason.NOT_CONGRUENT
