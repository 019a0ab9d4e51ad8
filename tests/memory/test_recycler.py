"""The recycler: what is kept of freed buffers, and for which buffers it is used."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
from collections.abc import Iterator

import pytest
from children import in_child
from recycling import KIB, MIB, freed, fresh_recycler, identity_of, statistics

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    ClosedError,
    Contents,
    Direction,
    MemoryDescriptor,
    PageKind,
    page_size,
    recycler,
)
from memdesc.memory.kept import Refusal

SIZE = 256 * KIB
RO, RW = Access.READ_ONLY, Access.READ_WRITE


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with fresh_recycler():
        yield


def refused() -> dict[Refusal, int]:
    return dict(statistics().refused)


def whole_file(buffer: BufferMemoryDescriptor) -> bytes:
    """All that a grantee would see, the part past the capacity too."""
    memory = buffer.memory
    fd = memory.open(RO)
    try:
        return os.pread(fd, memory.size, 0)
    finally:
        os.close(fd)


# ── Used again ───────────────────────────────────────────────────────────────────────────────


def test_the_next_buffer_is_made_of_the_same_memory() -> None:
    identity = freed()
    assert (statistics().kept_bytes, statistics().kept_blocks) == (SIZE, 1)
    assert statistics().sizes == {SIZE: 1}
    with BufferMemoryDescriptor(SIZE) as buffer:
        assert identity_of(buffer) == identity
        assert statistics().kept_bytes == statistics().kept_blocks == 0
        assert buffer.page_counts().resident == buffer.page_counts().total
        buffer.write_bytes(0, b"as any other")
        with buffer.map(unique=True) as mapping:
            assert bytes(memoryview(mapping)[:12]) == b"as any other"
        os.close(buffer.memory.grant(RO, user=os.geteuid()))
    assert (statistics().hits, statistics().misses) == (1, 1)


def test_it_is_zero_all_of_it() -> None:
    freed()
    with BufferMemoryDescriptor(SIZE - 100) as buffer:
        assert whole_file(buffer) == bytes(SIZE)


def test_undefined_contents_are_the_old_bytes_and_a_tail_of_zeros() -> None:
    freed()
    with BufferMemoryDescriptor(SIZE - 100, contents=Contents.UNDEFINED) as buffer:
        assert statistics().hits == 1
        assert whole_file(buffer) == b"\xff" * (SIZE - 100) + bytes(100)


def test_fresh_memory_is_zero_whatever_is_said() -> None:
    with BufferMemoryDescriptor(SIZE, contents=Contents.UNDEFINED) as buffer:
        assert statistics().misses == 1
        assert whole_file(buffer) == bytes(SIZE)


@pytest.mark.parametrize("contents", Contents)
def test_a_block_somewhat_larger_will_do(contents: Contents) -> None:
    identity = freed(MIB)
    with BufferMemoryDescriptor(MIB - 200 * KIB, contents=contents) as buffer:
        assert identity_of(buffer) == identity
        assert buffer.capacity == buffer.length == MIB - 200 * KIB
        assert whole_file(buffer)[buffer.capacity :] == bytes(200 * KIB)
    assert statistics().kept_bytes == MIB  # the whole file counts


def test_the_one_that_fits_best_is_taken() -> None:
    with BufferMemoryDescriptor(MIB) as one, BufferMemoryDescriptor(MIB - 128 * KIB) as two:
        large, small = identity_of(one), identity_of(two)
    with BufferMemoryDescriptor(MIB - 128 * KIB) as buffer:
        assert identity_of(buffer) == small
        with BufferMemoryDescriptor(MIB - 128 * KIB) as other:
            assert identity_of(other) == large


def test_of_equals_the_last_one_freed_is_taken() -> None:
    one, two = BufferMemoryDescriptor(SIZE), BufferMemoryDescriptor(SIZE)
    first = identity_of(one)
    two.close()
    one.close()
    with BufferMemoryDescriptor(SIZE) as buffer:
        assert identity_of(buffer) == first


def test_whoever_held_the_old_object_does_not_reach_the_new_buffer() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        old = buffer.memory
    with BufferMemoryDescriptor(SIZE) as buffer:
        assert identity_of(buffer) == old.identity
        assert buffer.memory is not old
        for reach in (old.fileno, old.own_fd, lambda: old.open(RO), lambda: old.grant(RO, user=0)):
            with pytest.raises(ClosedError):
                reach()
        old.close()
        assert not old.abandon()
        buffer.write_bytes(0, b"untouched")
        os.close(buffer.memory.grant(RO, user=os.geteuid()))


def test_memory_goes_round_many_times() -> None:
    identity = freed()
    for _ in range(50):
        assert freed() == identity
    assert statistics().hits == 50


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({"name": "other"}, SIZE),
        ({"max_access": RW}, SIZE),
        ({"pages": PageKind.AUTO}, SIZE),
        ({"lazy": True}, SIZE),
        ({"recycle": False}, SIZE),
        ({}, SIZE + 1),
        ({}, SIZE // 2),
    ],
)
def test_memory_that_does_not_fit_is_left_alone(options: dict[str, object], nbytes: int) -> None:
    identity = freed(pages=PageKind.BASE)
    options = {"pages": PageKind.BASE, **options}
    with BufferMemoryDescriptor(nbytes, **options) as buffer:  # type: ignore[arg-type]
        assert identity_of(buffer) != identity
        assert statistics().hits == 0
        assert identity in {block.object.identity for block in recycler._recycler._blocks}


def test_the_alignment_must_fit() -> None:
    freed(pages=PageKind.BASE)
    (block,) = recycler._recycler._blocks
    address = block.memory.address + block.start
    best = address & -address
    with BufferMemoryDescriptor(SIZE, alignment=2 * best, pages=PageKind.BASE) as buffer:
        assert statistics().hits == 0
        assert buffer.address % (2 * best) == 0
        freed_at = buffer.address
    with BufferMemoryDescriptor(SIZE, alignment=2 * best, pages=PageKind.BASE) as buffer:
        assert buffer.address == freed_at
        assert statistics().hits == 1


# ── Kept, and when ───────────────────────────────────────────────────────────────────────────


def test_it_is_kept_when_the_last_view_has_gone() -> None:
    buffer = BufferMemoryDescriptor(SIZE)
    view, array = memoryview(buffer), buffer.array(SIZE, "u1")
    identity = identity_of(buffer)
    buffer.close()
    assert statistics().kept_blocks == 0
    view.release()
    with BufferMemoryDescriptor(SIZE) as other:
        assert identity_of(other) != identity
    recycler.trim()
    array[0] = 1  # its own still
    del array
    assert [block.object.identity for block in recycler._recycler._blocks] == [identity]


def test_a_buffer_that_is_only_dropped_is_recycled_too() -> None:
    array = BufferMemoryDescriptor(SIZE).array(SIZE, "u1")
    array[:] = 7
    assert statistics().kept_blocks == 0
    del array
    gc.collect()
    assert statistics().kept_blocks == 1


def test_a_buffer_that_the_collector_frees_is_recycled_too() -> None:
    buffer = BufferMemoryDescriptor(SIZE)
    cycle: list[object] = [buffer]
    cycle.append(cycle)
    del buffer, cycle
    gc.collect()
    assert statistics().kept_blocks == 1


def test_wired_memory_is_unwired_first() -> None:
    with BufferMemoryDescriptor(SIZE, wired=True) as buffer:
        address = buffer.address
    assert statistics().kept_blocks == 1
    flags = ""
    with open("/proc/self/smaps") as smaps:
        inside = False
        for line in smaps:
            if "-" in line.split()[0]:
                low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
                inside = low <= address < high
            elif inside and line.startswith("VmFlags:"):
                flags = line
    assert " rd " in flags
    assert " lo " not in flags


@pytest.mark.parametrize("options", [{"lazy": True}, {"recycle": False}])
def test_what_is_not_to_be_kept_goes(options: dict[str, bool]) -> None:
    freed(**options)
    assert statistics().kept_blocks == 0
    assert refused() == {}


def test_what_a_garbage_cycle_still_views_is_recycled_too() -> None:
    """The buffer was closed long before: all that is left of it is in one garbage."""
    buffer = BufferMemoryDescriptor(SIZE)
    cycle: list[object] = [memoryview(buffer), buffer.memory]
    cycle.append(cycle)
    buffer.close()
    del buffer, cycle
    gc.collect()
    assert statistics().kept_blocks == 1
    with BufferMemoryDescriptor(SIZE):
        assert statistics().hits == 1


def test_the_smallest_buffer_is_recycled_too() -> None:
    identity = freed(1)
    with BufferMemoryDescriptor(page_size) as buffer:
        assert identity_of(buffer) == identity


def test_what_was_granted_is_not_kept() -> None:
    for access in Access:
        with BufferMemoryDescriptor(SIZE, max_access=access) as buffer:
            os.close(buffer.memory.grant(access, user=os.geteuid()))
    assert statistics().kept_blocks == 0
    assert refused() == {Refusal.NOT_ALLOWED: 2}


@pytest.mark.parametrize("mark", ["forked", "registered", "exposed", "another user"])
@pytest.mark.parametrize("when", ["before it is closed", "before its view goes", "once kept"])
def test_marked_memory_is_not_used_again(mark: str, when: str) -> None:
    """The mark may come at any time: it counts until the memory is handed on."""
    buffer = BufferMemoryDescriptor(SIZE)
    memory, view = buffer.memory, memoryview(buffer)

    def put_on() -> None:
        if mark == "forked":
            in_child(lambda: None)
        elif mark == "registered":
            memory.lifecycle.register(Contents)
        elif mark == "exposed":
            memory.lifecycle.exposed = True
        else:
            memory.lifecycle.grantees.add(os.geteuid() + 1)

    for moment, step in [
        ("before it is closed", buffer.close),
        ("before its view goes", view.release),
        ("once kept", lambda: None),
    ]:
        if moment == when:
            put_on()
        step()
    with BufferMemoryDescriptor(SIZE) as other:
        assert identity_of(other) != memory.identity
    if not (mark == "forked" and when == "once kept"):  # then it was given back before
        assert refused() == {Refusal.NOT_ALLOWED: 1}


def test_a_successor_begins_its_life_anew() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        old = buffer.memory.lifecycle
    with BufferMemoryDescriptor(SIZE) as buffer:
        assert statistics().hits == 1
        old.exposed = True
        assert not buffer.memory.lifecycle.exposed


# ── Somebody still has it ────────────────────────────────────────────────────────────────────


def test_a_further_mapping_of_this_program_keeps_it_from_being_used_again() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        mapping = buffer.map(access=RO, unique=True)
        identity = identity_of(buffer)
        view = memoryview(mapping)
        del mapping
    del buffer  # the mapping held it, and its view does not
    assert statistics().kept_blocks == 1
    with BufferMemoryDescriptor(SIZE) as other:
        assert identity_of(other) != identity
        assert (statistics().busy, statistics().kept_blocks) == (1, 1)
    recycler.trim(SIZE)  # the older of the two is given back: the busy one
    del view
    freed()
    assert statistics().kept_blocks == 1


def test_memory_is_used_again_once_it_is_let_go() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        fd, identity = buffer.memory.open(RO), identity_of(buffer)
    with BufferMemoryDescriptor(SIZE, recycle=False):
        assert recycler._recycler._blocks[0].object.is_held_by_others()
    os.close(fd)
    with BufferMemoryDescriptor(SIZE) as again:
        assert identity_of(again) == identity


def test_a_view_made_visible_once_more_is_not_used_again() -> None:
    """The mapping shares the description of the view under it: no lease would tell of it."""
    buffer = BufferMemoryDescriptor(SIZE)
    view, identity, address = memoryview(buffer), identity_of(buffer), buffer.address
    view[:5] = b"kept!"
    buffer.close()
    del buffer
    described = MemoryDescriptor.with_address_range(address, SIZE, Direction.OUT_IN)
    twin = described.map()  # by mremap, which needs no descriptor and no privilege
    described.close()
    del described
    view.release()
    assert (statistics().kept_blocks, refused()) == (0, {Refusal.SPOILED: 1})
    for _ in range(3):
        with BufferMemoryDescriptor(SIZE) as other:
            assert identity_of(other) != identity
            other.write_bytes(0, b"mine")
    assert bytes(memoryview(twin)[:5]) == b"kept!"
    twin.unmap()


def test_without_leases_nothing_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = freed()
    call = fcntl.fcntl

    def without(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "fcntl")
        return call(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)
    with BufferMemoryDescriptor(SIZE) as buffer:
        assert identity_of(buffer) != identity
    assert refused() == {Refusal.NO_LEASE: 1}
