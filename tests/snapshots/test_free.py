"""Snapshots without copying, and what a later one copies."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import re
from pathlib import Path

import pytest
from huge_pool import huge_pages

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    ClosedError,
    Direction,
    InvalidArgument,
    PageKind,
    SealedError,
    SnapshotMemoryDescriptor,
    SnapshotReason,
    SubMemoryDescriptor,
    WiringError,
    WiringReason,
    _core,
    page_size,
)
from memdesc.descriptors import freezing
from memdesc.memory.lifecycle import TABLE, State
from memdesc.vm import changes
from memdesc.vm.regions import region_at
from memdesc.vm.task import Task

PAGES = 12
SIZE = PAGES * page_size


def filled(length: int = SIZE, **how: object) -> tuple[BufferMemoryDescriptor, bytes]:
    buffer = BufferMemoryDescriptor(length, **how)  # type: ignore[arg-type]
    data = os.urandom(length)
    buffer.write_bytes(0, data)
    return buffer, data


def identity_at(address: int) -> tuple[object, str]:
    with Task.current() as task:
        region = region_at(task, address)
    assert region is not None
    return region.object.identity, region.permissions


@pytest.mark.parametrize("max_access", Access)
@pytest.mark.parametrize("length", [1, page_size, page_size + 1, SIZE])
def test_no_byte_is_copied_of_memory_that_nobody_else_saw(length: int, max_access: Access) -> None:
    buffer, data = filled(length, max_access=max_access)
    view, address, memory = memoryview(buffer), buffer.address, buffer.memory
    identity = memory.identity
    with buffer.snapshot() as frozen:
        assert (frozen.copied_bytes, frozen.reason, frozen.extent_count) == (0, None, 1)
        assert (frozen.length, frozen.name) == (length, buffer.name)
        assert (frozen.max_access, frozen.direction) == (Access.READ_ONLY, Direction.OUT)
        # The same object under both: the buffer's view private now, at the address it had.
        of_buffer, its_rights = identity_at(buffer.address)
        of_frozen, other_rights = identity_at(frozen.address)
        assert of_buffer == of_frozen
        assert (its_rights[:4], other_rights[:4]) == ("rw-p", "r--s")
        assert (buffer.address, buffer.memory, memory.identity) == (address, memory, identity)
        view[0] ^= 1
        assert frozen.read_bytes() == data
        assert bytes(view)[1:] == data[1:]
        assert view[0] == data[0] ^ 1 == buffer.read_bytes(0, 1)[0]
    assert buffer.memory.lifecycle.state is State.DETACHED
    buffer.close()


def test_the_kernel_holds_the_seals() -> None:
    buffer, _ = filled()
    frozen = buffer.snapshot()
    wanted = TABLE[State.FROZEN].seals
    assert buffer.memory.seals() & ~_core.F_SEAL_EXEC == wanted
    fd = frozen._extents(0, SIZE, Access.READ_ONLY)[0].object.open(Access.READ_ONLY)
    try:
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~_core.F_SEAL_EXEC == wanted
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
        with pytest.raises(OSError):
            mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # Re-opened for writing, as its user may, it is no more writable: root included.
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(again, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(PermissionError):
                os.truncate(again, 0)
        finally:
            os.close(again)
    finally:
        os.close(fd)
    buffer.close()
    frozen.close()


def test_a_snapshot_can_not_be_written() -> None:
    buffer, data = filled()
    with buffer, buffer.snapshot() as frozen:
        assert memoryview(frozen).readonly
        assert not frozen.array().flags.writeable
        with pytest.raises(SealedError) as caught:
            frozen.write_bytes(0, b"x")
        assert caught.value.errno == errno.EACCES
        with pytest.raises(OSError):
            frozen.map(access=Access.READ_WRITE)
        with pytest.raises(WiringError) as wiring:
            frozen.prepare(Direction.IN)
        assert wiring.value.reason is WiringReason.NOT_WRITABLE
        with frozen.prepared():
            assert frozen.page_counts().resident == PAGES
        with open("/proc/self/mem", "r+b", buffering=0) as memory, pytest.raises(OSError):
            os.pwrite(memory.fileno(), b"x", frozen.address)
        with pytest.raises(OSError):
            _core.mprotect(frozen.address, page_size, _core.PROT_READ | _core.PROT_WRITE)
        assert frozen.read_bytes() == data


def test_a_snapshot_of_a_snapshot_is_the_same_memory() -> None:
    buffer, data = filled()
    with buffer, buffer.snapshot() as frozen:
        with frozen.snapshot() as again, SubMemoryDescriptor(frozen, 5, page_size) as part:
            of_part = part.snapshot()
            for snapshot in (again, of_part):
                assert (snapshot.copied_bytes, snapshot.reason) == (0, None)
                assert identity_at(snapshot.address)[0] == identity_at(frozen.address)[0]
        frozen.close()
        buffer.close()
        assert of_part.read_bytes() == data[5:][:page_size]
        assert again.closed
        of_part.close()


@pytest.mark.parametrize("order", ["source first", "snapshots first", "mixed"])
def test_each_lives_on_without_the_others(order: str) -> None:
    buffer, data = filled()
    first = buffer.snapshot()
    buffer.write_bytes(page_size, b"later")
    changed = data[:page_size] + b"later" + data[page_size + 5 :]
    second = buffer.snapshot()
    third = buffer.snapshot()
    views = [memoryview(first), memoryview(second), memoryview(third), memoryview(buffer)]
    closing = {
        "source first": [buffer, first, second, third],
        "snapshots first": [third, second, first, buffer],
        "mixed": [second, buffer, first, third],
    }[order]
    for descriptor in closing:
        descriptor.close()
        gc.collect()
        assert [bytes(view) for view in views] == [data, changed, changed, changed]
    with pytest.raises(ClosedError):
        first.snapshot()
    with pytest.raises(ClosedError):
        buffer.snapshot()


def test_a_later_snapshot_copies_only_what_changed() -> None:
    buffer, data = filled()
    model = bytearray(data)
    with buffer, buffer.snapshot() as first:
        for places in ([3], [3, 4], [3, 4, 9], [3, 4, 9, 0]):
            at = places[-1] * page_size + 7
            buffer.write_bytes(at, b"changed")
            model[at : at + 7] = b"changed"
            with buffer.snapshot() as later:
                assert later.copied_bytes == len(places) * page_size
                assert later.reason is SnapshotReason.CHANGED
                assert later.read_bytes() == model == buffer.read_bytes()
                assert bytes(later.map()) == model
        assert first.read_bytes() == data
        assert (buffer.moves, buffer.moved_bytes) == (0, 0)


def test_the_last_page_is_copied_to_the_length_and_zero_behind() -> None:
    buffer, data = filled(SIZE - 100)
    with buffer, buffer.snapshot():
        buffer.write_bytes(SIZE - 101, b"!")
        later = buffer.snapshot()
        assert later.copied_bytes == page_size - 100
        assert later.read_bytes() == data[:-1] + b"!"
        last = later._extents(SIZE - 101, 1, Access.READ_ONLY)[0]
        fd = last.object.open(Access.READ_ONLY)
        assert os.pread(fd, 200, last.offset) == b"!" + bytes(
            len(os.pread(fd, 200, last.offset)) - 1
        )
        os.close(fd)
        later.close()


def test_more_than_half_changed_is_copied_whole() -> None:
    buffer, _ = filled()
    with buffer, buffer.snapshot():
        buffer.write_bytes(0, b"x" * (SIZE // 2))
        with buffer.snapshot() as half:
            assert (half.copied_bytes, half.reason) == (SIZE // 2, SnapshotReason.CHANGED)
        buffer.write_bytes(SIZE // 2, b"x")
        with buffer.snapshot() as more:
            assert (more.copied_bytes, more.reason) == (SIZE, SnapshotReason.SCATTERED)
            assert more.extent_count == 1
            assert more.read_bytes() == buffer.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "reason"), [(499, "CHANGED"), (500, "SCATTERED")])
def test_more_than_a_thousand_extents_are_compacted(runs: int, reason: str) -> None:
    size = 4 * 500 * page_size
    buffer, _ = filled(size, pages=PageKind.BASE)
    with buffer, buffer.snapshot():
        cells = buffer.array(dtype="u1")
        cells[page_size :: 4 * page_size][:runs] ^= 1
        with buffer.snapshot() as later:
            assert later.reason is SnapshotReason[reason]
            assert later.extent_count == (999 if reason == "CHANGED" else 1)
            assert later.copied_bytes == (runs * page_size if reason == "CHANGED" else size)
            assert later.read_bytes() == buffer.read_bytes()
        del cells


@pytest.mark.parametrize("how", [changes._scan, changes._read])
def test_what_changed_is_what_the_page_table_shows(how: object) -> None:
    buffer, _ = filled()
    with buffer, buffer.snapshot():
        for page in (0, 1, 5, PAGES - 1):
            buffer.write_bytes(page * page_size, b"x")
        memoryview(buffer)[7 * page_size]  # read only
        wanted = [(0, 2), (5, 1), (PAGES - 1, 1)]
        wanted = [(start * page_size, count * page_size) for start, count in wanted]
        try:
            assert how(buffer.address, SIZE, 3) == wanted  # type: ignore[operator]
            assert how(buffer.address, SIZE, 2) is None  # type: ignore[operator]
        except OSError as error:
            assert how is changes._scan
            pytest.skip(f"this kernel has no PAGEMAP_SCAN: {error.strerror}")


def test_a_kernel_without_pagemap_scan_reads_the_page_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_such_call(*_: object) -> int:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    buffer, data = filled()
    with buffer, buffer.snapshot():
        buffer.write_bytes(2 * page_size, b"x")
        monkeypatch.setattr(changes.fcntl, "ioctl", no_such_call)
        with buffer.snapshot() as later:
            assert (later.copied_bytes, later.reason) == (page_size, SnapshotReason.CHANGED)
            assert later.read_bytes() == data[: 2 * page_size] + b"x" + data[2 * page_size + 1 :]


def test_only_the_length_is_described() -> None:
    buffer, data = filled()
    with buffer:
        buffer.set_length(page_size + 10)
        with buffer.snapshot() as short:
            assert short.read_bytes() == data[: page_size + 10]
        buffer.append_bytes(b"more")
        with buffer.snapshot() as longer:
            assert longer.copied_bytes == 14
            assert longer.read_bytes() == data[: page_size + 10] + b"more"
        buffer.set_length(SIZE)
        with buffer.snapshot() as whole:
            assert whole.read_bytes() == buffer.read_bytes()
        buffer.set_length(0)
        with pytest.raises(InvalidArgument):
            buffer.snapshot()


def test_wired_after_the_snapshot_it_is_wired() -> None:
    buffer, data = filled()
    with buffer, buffer.snapshot() as frozen:
        buffer.write_bytes(0, b"x")
        with buffer.prepared():
            assert buffer.memory.lifecycle.state is State.PRIVATE
            assert buffer.moves == 1
            buffer.write_bytes(1, b"y")
            with buffer.snapshot() as copied:
                assert copied.reason is SnapshotReason.WIRED
                assert copied.read_bytes() == b"xy" + data[2:]
        with buffer.snapshot() as free:
            assert free.copied_bytes == 0
        assert frozen.read_bytes() == data


@pytest.mark.parametrize("alignment", [page_size, 1 << 20])
def test_any_alignment(alignment: int) -> None:
    buffer, data = filled(alignment=alignment)
    with buffer, buffer.snapshot() as frozen:
        assert frozen.copied_bytes == 0
        buffer.write_bytes(0, b"x")
        buffer.map(unique=True).unmap()
        assert buffer.address % alignment == 0
        assert buffer.read_bytes() == b"x" + data[1:]
        assert frozen.read_bytes() == data


def test_lazy_memory() -> None:
    with BufferMemoryDescriptor(SIZE, lazy=True) as buffer:
        buffer.write_bytes(page_size, b"x")
        with buffer.snapshot() as frozen:
            assert frozen.copied_bytes == 0
            buffer.write_bytes(3 * page_size, b"y")
            assert frozen.read_bytes() == bytes(page_size) + b"x" + bytes(SIZE - page_size - 1)


@pytest.mark.slow
def test_huge_pages() -> None:
    huge = PageKind.HUGE.page_size
    with huge_pages(9):  # 3 of the buffer, as many again reserved for its stores, 1 copied
        buffer, data = filled(3 * huge, pages=PageKind.HUGE)
        model = bytearray(data)
        with buffer.snapshot() as frozen:
            assert (frozen.copied_bytes, frozen.reason) == (0, None)
            buffer.write_bytes(huge + 5, b"changed")
            model[huge + 5 : huge + 12] = b"changed"
            with buffer.snapshot() as later:
                assert (later.copied_bytes, later.reason) == (huge, SnapshotReason.CHANGED)
                assert later.read_bytes() == model == buffer.read_bytes()
            assert frozen.read_bytes() == data
        buffer.close()
        del buffer


@pytest.mark.slow
def test_a_pool_that_can_not_hold_the_stores_to_come_means_copying() -> None:
    huge = PageKind.HUGE.page_size
    with huge_pages(3):
        buffer, data = filled(3 * huge, pages=PageKind.HUGE)
        free = [BufferMemoryDescriptor(huge, pages=PageKind.HUGE) for _ in range(_free_pages())]
        with buffer.snapshot() as frozen:
            assert frozen.reason is SnapshotReason.NO_MEMORY
            assert frozen.copied_bytes == len(data)
            buffer.write_bytes(huge, b"x")
            assert frozen.read_bytes() == data
            assert buffer.memory.lifecycle.state is State.PRIVATE
        buffer.close()
        for other in free:
            other.close()
        del buffer, free


def _free_pages() -> int:
    from huge_pool import free_pages

    return free_pages()


def test_the_step_of_copying_is_whole_pages() -> None:
    assert freezing._STEP % page_size == 0  # the runs of one extent meet on page borders


def test_the_page_has_each_reason() -> None:
    page = Path(__file__).parents[2] / "docs" / "snapshots.md"
    rows = re.findall(r"^\| `([A-Z_]+)` \|", page.read_text(), re.M)
    assert sorted(rows) == sorted(SnapshotReason.__members__)


def test_it_is_a_kind_of_its_own() -> None:
    buffer, _ = filled()
    with buffer, buffer.snapshot() as frozen:
        assert isinstance(frozen, SnapshotMemoryDescriptor)
        assert "read-only" in repr(frozen)
