"""Wiring that fails: the reason that is found, and that nothing stays half wired."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable
from typing import Any

import pytest
from children import capability, in_child, limit_locking
from wired import (
    CAP_IPC_LOCK,
    CLONE_NEWUSER,
    MAP_NORESERVE,
    READ_WRITE,
    at,
    fails,
    libc,
    locked,
    nothing_wired,  # noqa: F401 - a fixture for every test here
    pages,
    unmap,
)

from memdesc import _core
from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    UnsupportedError,
    WiringError,
    WiringReason,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.wiring import statistics, wire, wire_count, wired_bytes

# ── Failing: the reason, and nothing half wired ──────────────────────────────────────────────


@pytest.mark.parametrize("hole", [0, 2, 5])
def test_a_hole_is_not_mapped(hole: int) -> None:
    memory = pages(6)
    unmap(memory, hole, 1)
    error = fails(memory, 0, 6)
    assert (error.reason, error.errno) == (WiringReason.NOT_MAPPED, errno.ENOMEM)
    assert f"{page_size:,} bytes at {at(memory, hole):#x} are not mapped" in str(error)
    assert isinstance(error.__cause__, OSError)


def test_a_failed_call_unlocks_only_what_it_locked() -> None:
    memory = pages(8)
    unmap(memory, 6, 1)
    with wire(at(memory, 1), page_size, keep=memory), wire(at(memory, 4), 1, keep=memory):
        assert locked() == 2
        fails(memory, 0, 8)
        assert [wire_count(at(memory, page)) for page in (0, 1, 4, 5)] == [0, 1, 1, 0]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_the_runs_before_the_one_that_failed_are_unlocked(after: int) -> None:
    memory = pages(7)
    with wire(at(memory, 2), 1, keep=memory), wire(at(memory, 4), 1, keep=memory):
        with failing("mlock", errno.EAGAIN, after=after) as fault:
            error = fails(memory, 0, 7)
        assert fault.calls == after + 1
        assert (error.reason, error.errno) == (WiringReason.NO_MEMORY, errno.EAGAIN)


def test_memory_that_may_not_be_accessed() -> None:
    memory = pages(4)
    _core.mprotect(at(memory, 2), page_size, _core.PROT_NONE)
    error = fails(memory, 0, 4)
    assert (error.reason, error.errno) == (WiringReason.PROTECTION, errno.ENOMEM)
    assert f"{at(memory, 2):#x}" in str(error)


def test_wiring_for_writing_needs_writable_memory() -> None:
    memory = pages(4)
    with wire(at(memory), 4 * page_size, keep=memory, for_writing=True):
        assert locked() == 4
    _core.mprotect(at(memory, 3), page_size, _core.PROT_READ)
    error = fails(memory, 0, 4, for_writing=True)
    assert (error.reason, error.errno) == (WiringReason.PROTECTION, errno.EACCES)
    with wire(at(memory), 4 * page_size, keep=memory):
        # Unlike in XNU also where the pages are wired already.
        fails(memory, 0, 4, for_writing=True)


def test_pages_past_the_end_of_a_file_are_not_mapped() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, page_size)
    memory = _core.map_memory(0, 4 * page_size, READ_WRITE, _core.MAP_SHARED, fd, 0)
    os.close(fd)
    with pytest.raises(WiringError) as caught:
        wire(memory.address, memory.length, keep=memory)
    assert caught.value.reason is WiringReason.NOT_MAPPED
    assert "end of its file" in str(caught.value)
    assert locked() == 0


def test_more_than_the_machine_has_is_refused_before_a_page_is_touched() -> None:
    with open("/proc/meminfo") as info:
        available = next(int(line.split()[1]) for line in info if line.startswith("MemAvail"))
    try:
        memory = pages(available * 1024 * 2 // page_size, flags=MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"this machine does not overcommit: {error}")
    error = fails(memory, 0, memory.length // page_size - 2)
    assert (error.reason, error.errno) == (WiringReason.NO_MEMORY, errno.ENOMEM)
    assert not any(_core.mincore(at(memory), 64 * page_size))


def over_the_limit() -> tuple[WiringReason, int | None, str]:
    memory = pages(24)
    with wire(at(memory), 10 * page_size, keep=memory):
        error = fails(memory, 0, 24)
        with wire(at(memory, 8), 8 * page_size, keep=memory):  # exactly up to the limit
            assert locked() == 16
            # What is wired already costs nothing more (as in XNU: checked from 0 to 1 only).
            with wire(at(memory), 16 * page_size, keep=memory):
                assert locked() == 16
    return error.reason, error.errno, str(error)


def test_the_limit_on_locked_memory() -> None:
    reason, number, message = in_child(over_the_limit, before=lambda: limit_locking(16 * page_size))
    assert (reason, number) == (WiringReason.LIMIT, errno.ENOMEM)
    for amount in (14, 10, 16):
        assert f"{amount * page_size:,}" in message
    assert "ulimit -l" in message


def test_the_limit_met_in_the_second_part_of_a_range() -> None:
    # 1 page is wired, 8 more lock, 11 more would be 20: the 8 are unlocked by when it is looked.
    def in_two_parts() -> WiringReason:
        memory = pages(20)
        with wire(at(memory, 8), 1, keep=memory):
            return fails(memory, 0, 20).reason

    found = in_child(in_two_parts, before=lambda: limit_locking(16 * page_size))
    assert found is WiringReason.LIMIT


def test_a_hole_within_the_limit_is_not_taken_for_the_limit() -> None:
    # The prefix that mlock leaves locked must not be counted against the limit.
    def with_hole() -> WiringReason:
        memory = pages(12)
        unmap(memory, 10, 1)
        return fails(memory, 0, 12).reason

    found = in_child(with_hole, before=lambda: limit_locking(16 * page_size))
    assert found is WiringReason.NOT_MAPPED


def test_no_locking_at_all_needs_the_privilege() -> None:
    def unprivileged() -> tuple[WiringReason, int | None]:
        error = fails(pages(1), 0, 1)
        return error.reason, error.errno

    found = in_child(unprivileged, before=lambda: limit_locking(0))
    assert found == (WiringReason.NOT_PRIVILEGED, errno.EPERM)


def test_a_holder_of_the_capability_has_no_limit() -> None:
    if not capability(CAP_IPC_LOCK):
        pytest.skip("CAP_IPC_LOCK is not held")

    def privileged() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        memory = pages(4)
        with wire(at(memory), 4 * page_size, keep=memory):
            return locked()

    try:
        assert in_child(privileged) == 4
    except AssertionError as error:
        if "NOT_PRIVILEGED" in str(error) or "EPERM" in str(error):
            pytest.skip("CAP_IPC_LOCK is held in a user namespace only, where it lifts nothing")
        raise


def test_the_capability_in_a_user_namespace_lifts_no_limit() -> None:
    def in_namespace() -> tuple[bool, WiringReason]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * page_size,) * 2)
        if libc.unshare(CLONE_NEWUSER) != 0:
            pytest.skip(f"no user namespace: {os.strerror(ctypes.get_errno())}")
        return capability(CAP_IPC_LOCK), fails(pages(8), 0, 8).reason

    assert in_child(in_namespace) == (True, WiringReason.LIMIT)


def at_the_most_regions(then: Callable[[], Any]) -> Any:
    """Call `then` while this process has as many regions as the kernel allows."""
    with open("/proc/sys/vm/max_map_count") as file:
        most = int(file.read())
    if most > 1 << 18:
        pytest.skip(f"vm.max_map_count is {most}: reaching it takes too long")
    room = _core.reserve_memory((2 * most + 2) * page_size)
    for page in range(0, 2 * most, 2):
        try:
            _core.mprotect(room.address + page * page_size, page_size, _core.PROT_READ)
        except OSError as error:
            assert error.errno == errno.ENOMEM
            return then()
    raise AssertionError("the kernel set no limit")


@pytest.mark.slow
def test_too_many_mappings() -> None:
    def exhausted() -> WiringReason:
        memory = pages(8)
        return at_the_most_regions(lambda: fails(memory, 3, 2).reason)

    assert in_child(exhausted, timeout=100) is WiringReason.TOO_MANY_MAPPINGS


@pytest.mark.slow
def test_at_the_most_regions_a_release_can_be_refused_and_is_reported() -> None:
    def exhausted() -> tuple[int, int, int]:
        memory = pages(8)
        outer = [wire(at(memory, page), 1, keep=memory) for page in (2, 3, 4)]

        def release_the_middle() -> tuple[int, int, int]:
            outer[1].release()  # splits the one locked region of three pages
            return locked(), wired_bytes() // page_size, statistics().not_unlocked // page_size

        return at_the_most_regions(release_the_middle)

    assert in_child(exhausted, timeout=100) == (3, 2, 1)


def test_without_a_file_descriptor_left() -> None:
    def exhausted() -> tuple[WiringReason, int | None, int]:
        memory, other = pages(4), pages(4)
        unmap(memory, 2, 1)
        claim = wire(at(other), 4 * page_size, keep=other)
        unmap(other, 1, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(WiringError) as refused:
                wire(at(memory), 4 * page_size, keep=memory)
            with pytest.raises(AllocationError) as blind:
                wire(at(memory), 1, keep=memory, for_writing=True)
            claim.release()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert wired_bytes() == 0
        assert locked() == 2  # behind the hole, and told
        assert statistics().not_unlocked == 4 * page_size
        return refused.value.reason, refused.value.errno, blind.value.errno or 0

    found = in_child(exhausted)
    assert found == (WiringReason.NO_MEMORY, errno.ENOMEM, errno.EMFILE)


def test_where_a_filter_hides_mlock() -> None:
    memory = pages(1)
    with failing("mlock", errno.ENOSYS), pytest.raises(UnsupportedError) as caught:
        wire(at(memory), 1, keep=memory)
    assert caught.value.errno == errno.ENOSYS
    assert locked() == 0


@pytest.mark.parametrize(
    ("address", "length"),
    [(4096, 0), (4096, -1), (-4096, 4096), (2**63 - 1, 1 << 12), (4096, 2**63), (0.5, 1)],
)
def test_what_is_no_range(address: Any, length: int) -> None:
    with pytest.raises(InvalidArgument):
        wire(address, length)
    assert statistics().tokens == 0


def test_addresses_that_no_task_has_are_not_mapped() -> None:
    with pytest.raises(WiringError) as caught:
        wire(2**62, 1)
    assert caught.value.reason in (WiringReason.NOT_MAPPED, WiringReason.LIMIT)
