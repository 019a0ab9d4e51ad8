"""Physical pages: pagemap against what this process did, and the proof of same pages."""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from contextlib import ExitStack

import pytest
from children import become, in_child
from hypothesis import given, strategies as st
from privilege import Privilege, run_as
from programs import Start, huge_memfd, mapped, memfd

from memdesc import _core
from memdesc.errors import InvalidArgument, NotPrivilegedError, TaskGoneError
from memdesc.vm import physical
from memdesc.vm.pages import page_size
from memdesc.vm.physical import (
    Proof,
    frames,
    is_file_or_shared,
    is_present,
    is_swapped,
    pagemap,
    resident_pages,
    same_pages,
)
from memdesc.vm.probe import probe_feature
from memdesc.vm.regions import ObjectKind, regions
from memdesc.vm.task import Task

SHARED = mmap.MAP_SHARED
ANONYMOUS = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@pytest.fixture
def sees_frames() -> None:
    feature = probe_feature("page_frames")
    if not feature.available:
        pytest.skip(f"page frames need {feature.needs}, which was denied")


def populate(address: int, length: int) -> None:
    _core.madvise(address, length, _core.MADV_POPULATE_WRITE)


@given(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**55 - 1))
def test_the_bits_of_an_entry(present: bool, swapped: bool, shared: bool, frame: int) -> None:
    entry = present << 63 | swapped << 62 | shared << 61 | frame
    assert is_present(entry) is present
    assert is_swapped(entry) is swapped
    assert is_file_or_shared(entry) is shared


def test_pages_show_once_they_are_there(own: Task) -> None:
    with mapped(4 * page_size, ANONYMOUS) as address:
        assert list(pagemap(own, address, 4 * page_size)) == [0, 0, 0, 0]
        assert resident_pages(own, address, 4 * page_size) == 0
        populate(address + page_size, 2 * page_size)
        entries = pagemap(own, address, 4 * page_size)
        assert [is_present(entry) for entry in entries] == [False, True, True, False]
        assert [is_file_or_shared(entry) for entry in entries] == [False, True, True, False]
        assert not any(map(is_swapped, entries))
        assert resident_pages(own, address, 4 * page_size) == 2


def test_private_pages_are_told_from_shared_ones(own: Task) -> None:
    with mapped(page_size, PRIVATE) as address:
        populate(address, page_size)
        (entry,) = pagemap(own, address, 1)
        assert is_present(entry)
        assert not is_file_or_shared(entry)


def test_a_range_counts_every_page_that_it_touches(own: Task) -> None:
    with mapped(3 * page_size, ANONYMOUS) as address:
        assert len(pagemap(own, address + page_size - 1, 2)) == 2
        assert len(pagemap(own, address + 1, page_size)) == 2
        assert len(pagemap(own, address, page_size)) == 1


def test_ranges_larger_than_one_read(own: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(physical, "_CHUNK", 3)
    with mapped(8 * page_size, ANONYMOUS) as address:
        populate(address + 2 * page_size, 5 * page_size)
        entries = pagemap(own, address, 8 * page_size)
        assert [is_present(entry) for entry in entries] == [False] * 2 + [True] * 5 + [False]
        assert resident_pages(own, address, 8 * page_size) == 5


@pytest.mark.parametrize("address", [2**47, 2**62])
def test_past_the_address_space(own: Task, address: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pagemap(own, address, page_size)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("address", "length"), [(-1, 1), (0, 0), (0, -1), (2**63 - 1, 10)])
def test_what_is_no_range_is_refused(own: Task, address: int, length: int) -> None:
    for use in (pagemap, frames, resident_pages):
        with pytest.raises(InvalidArgument):
            use(own, address, length)
    with pytest.raises(InvalidArgument):
        same_pages(own, address, own, page_size, length)
    with pytest.raises(InvalidArgument):
        same_pages(own, page_size, own, address, length)


def test_frames_are_one_for_each_page(own: Task, sees_frames: None) -> None:
    with mapped(4 * page_size, ANONYMOUS) as address:
        populate(address, 3 * page_size)
        found = frames(own, address, 4 * page_size)
    assert found[3] is None
    assert None not in found[:3]
    assert len(set(found[:3])) == 3


@pytest.mark.alone
def test_the_frames_of_a_huge_page_are_consecutive(
    own: Task, sees_frames: None, huge_page: int
) -> None:
    with huge_memfd(huge_page) as fd, mapped(huge_page, SHARED, fd) as address:
        assert resident_pages(own, address, huge_page) == 0
        populate(address, huge_page)
        found = frames(own, address, huge_page)
        assert resident_pages(own, address, huge_page) == huge_page // page_size
    first = found[0]
    assert first is not None
    assert first % (huge_page // page_size) == 0
    assert found == list(range(first, first + huge_page // page_size))


_LOOK_AT_FRAMES = """
import mmap
from memdesc import _core
from memdesc.errors import NotPrivilegedError
from memdesc.vm.physical import frames, resident_pages
from memdesc.vm.task import Task
page = mmap.mmap(-1, mmap.PAGESIZE)
address, own = _core.buffer_address(page)[0], Task.current()
print(frames(own, address, 1))
page[0] = 1
print(resident_pages(own, address, 1))
try:
    frames(own, address, 1)
except NotPrivilegedError as error:
    print(error.errno, "CAP_SYS_ADMIN" in str(error))
"""


@pytest.mark.parametrize("privilege", [Privilege.USER, Privilege.CONTAINER])
def test_frames_that_the_kernel_hides(privilege: Privilege) -> None:
    run = run_as(privilege, _LOOK_AT_FRAMES)
    # Nothing there, nothing hidden; a page that is there shows without its frame.
    assert run.stdout.split("\n") == ["[None]", "1", f"{int(errno.EPERM)} True", ""], run.stderr


def test_hidden_frames_are_told_by_their_zeros(own: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the kernel gives to a process without CAP_SYS_ADMIN: the bits without the frame.
    monkeypatch.setattr(physical, "pagemap", lambda *_: array("Q", [1 << 63 | 1 << 61, 0]))
    with pytest.raises(NotPrivilegedError) as caught:
        frames(own, page_size, 2 * page_size)
    assert caught.value.errno == errno.EPERM


# --- The proof -------------------------------------------------------------------------------


def test_two_mappings_of_one_object(own: Task, sees_frames: None) -> None:
    with ExitStack() as stack:
        fd = stack.enter_context(memfd(4 * page_size))
        one = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        two = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        populate(one, 4 * page_size)
        populate(two, 4 * page_size)
        assert same_pages(own, one, own, two, 4 * page_size) == Proof(True, "frames", "", "")
        assert same_pages(own, one + 100, own, two + 100, page_size)
        apart = same_pages(own, one, own, two + page_size, 3 * page_size)
        assert (bool(apart), apart.proof) == (False, "frames")
        assert "page 0" in apart.why
        aside = same_pages(own, one, own, two + 1, page_size)
        assert (bool(aside), aside.proof) == (False, "frames")


def test_pages_that_are_not_there_are_proved_by_the_object(own: Task) -> None:
    with ExitStack() as stack:
        fd = stack.enter_context(memfd(4 * page_size))
        one = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        two = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        proof = same_pages(own, one, own, two, 4 * page_size)
        assert (proof.same, proof.proof, proof.why) == (True, "object", "")
        assert "4 of 4 pages are not present" in proof.denied
        assert same_pages(own, one + 100, own, two + 100, page_size)
        apart = same_pages(own, one, own, two + page_size, 3 * page_size)
        assert (apart.same, apart.proof) == (False, "object")
        assert not same_pages(own, one, own, two + 1, page_size)


def test_frames_that_are_hidden_leave_the_object(
    own: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(entries: object, task: Task) -> object:
        raise NotPrivilegedError("no CAP_SYS_ADMIN", errno=errno.EPERM)

    monkeypatch.setattr(physical, "_frames_of", hidden)
    with ExitStack() as stack:
        fd = stack.enter_context(memfd(page_size))
        one = stack.enter_context(mapped(page_size, SHARED, fd))
        two = stack.enter_context(mapped(page_size, SHARED, fd))
        assert same_pages(own, one, own, two, page_size) == Proof(
            True, "object", "no CAP_SYS_ADMIN", ""
        )


def test_regions_that_part_and_join(own: Task) -> None:
    with ExitStack() as stack:
        fd = stack.enter_context(memfd(4 * page_size))
        one = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        two = stack.enter_context(mapped(4 * page_size, SHARED, fd))
        _core.mprotect(two + page_size, page_size, mmap.PROT_READ)  # three regions, one object
        assert len([r for r in regions(own) if two <= r.start < two + 4 * page_size]) == 3
        proof = same_pages(own, one, own, two, 4 * page_size)
        assert (proof.same, proof.proof) == (True, "object")


def test_two_objects_are_not_the_same(own: Task) -> None:
    with mapped(page_size, ANONYMOUS) as one, mapped(page_size, ANONYMOUS) as two:
        assert not same_pages(own, one, own, two, page_size)
        populate(one, page_size)
        populate(two, page_size)
        assert not same_pages(own, one, own, two, page_size)


def test_private_memory_is_never_the_same_as_another(own: Task) -> None:
    with ExitStack() as stack:
        fd = stack.enter_context(memfd(page_size))
        shared = stack.enter_context(mapped(page_size, SHARED, fd))
        private = stack.enter_context(mapped(page_size, mmap.MAP_PRIVATE, fd))
        proof = same_pages(own, shared, own, private, page_size)
        assert (proof.same, proof.proof) == (False, "object")
        assert "private" in proof.why
        assert not same_pages(own, private, own, shared, page_size)


def test_the_zero_page_proves_nothing(own: Task) -> None:
    with mapped(page_size, PRIVATE) as one, mapped(page_size, PRIVATE) as two:
        for address in (one, two):
            _core.madvise(address, page_size, _core.MADV_POPULATE_READ)
        assert not same_pages(own, one, own, two, page_size)


def test_what_fork_left_to_be_copied_proves_nothing() -> None:
    with mapped(page_size, PRIVATE) as private, mapped(page_size, ANONYMOUS) as shared:
        populate(private, page_size)
        populate(shared, page_size)

        def look() -> tuple[bool, bool]:
            _core.madvise(shared, page_size, _core.MADV_POPULATE_READ)
            with Task(os.getppid()) as parent, Task.current() as own:
                return (
                    same_pages(parent, private, own, private, page_size).same,
                    same_pages(parent, shared, own, shared, page_size).same,
                )

        assert in_child(look) == (False, True)


def test_a_hole_is_not_the_same_as_anything(own: Task) -> None:
    with mapped(page_size, ANONYMOUS) as address:
        unmapped = page_size  # nothing is ever mapped below vm.mmap_min_addr
        proof = same_pages(own, address, own, unmapped, page_size)
        assert (proof.same, proof.proof) == (False, "object")
        assert "not mapped" in proof.why


def test_a_frame_that_moves_between_the_readings_is_read_again(
    own: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = 1 << 63 | 1 << 61
    readings = [shared | 5, shared | 6, shared | 6, shared | 6]  # moved after the first
    monkeypatch.setattr(physical, "pagemap", lambda *_: array("Q", [readings.pop(0)]))
    assert same_pages(own, page_size, own, page_size, 1) == Proof(True, "frames", "", "")
    assert readings == []


_WRITES = """
import mmap
buffer = mmap.mmap(-1, 8 * mmap.PAGESIZE)
buffer[:] = b'x' * len(buffer)
"""


def test_another_task(start: Start, own: Task) -> None:
    with Task(start(_WRITES).pid) as task:
        (region,) = [r for r in regions(task) if r.object.kind is ObjectKind.SHARED_ANONYMOUS]
        assert resident_pages(task, region.start, region.length) == 8
        assert same_pages(task, region.start, task, region.start, region.length)
        with mapped(8 * page_size, ANONYMOUS) as address:
            assert not same_pages(task, region.start, own, address, region.length)


def test_a_task_that_has_ended(start: Start, own: Task) -> None:
    child = start()
    with Task(child.pid) as task, mapped(page_size, ANONYMOUS) as address:
        child.kill()
        child.wait()
        for use in (pagemap, frames, resident_pages):
            with pytest.raises(TaskGoneError) as caught:
                use(task, address, page_size)
            assert caught.value.errno == errno.ESRCH
        with pytest.raises(TaskGoneError):
            same_pages(own, address, task, address, page_size)


def test_a_task_that_ends_while_it_is_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start()
    preadv = os.preadv

    def kill_first(fd: int, buffers: list[memoryview], offset: int) -> int:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        return preadv(fd, buffers, offset)

    with Task(child.pid) as task:
        monkeypatch.setattr(os, "preadv", kill_first)
        with pytest.raises(TaskGoneError):
            pagemap(task, page_size, page_size)


def test_reading_that_fails(own: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(NotPrivilegedError) as caught:
        pagemap(own, page_size, page_size)
    assert caught.value.errno == errno.EPERM


def test_a_task_of_another_user() -> None:
    parent = os.getpid()

    def look() -> int | None:
        become(65534)
        with Task(parent) as task, Task.current() as own:
            for use in (
                lambda: pagemap(task, page_size, page_size),
                lambda: same_pages(task, page_size, own, page_size, page_size),
            ):
                with pytest.raises(NotPrivilegedError) as caught:
                    use()
        return caught.value.errno

    assert in_child(look) == errno.EACCES
