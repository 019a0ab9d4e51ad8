"""Wiring: what the kernel has locked (VmLck) is what the claims say, whatever happens."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest
from children import capability, in_child, limit_locking
from hypothesis import given, settings, strategies as st

from memdesc import _core
from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    MemdescError,
    UnsupportedError,
    WiringError,
    WiringReason,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.wiring import Wire, statistics, wire, wire_count, wired_bytes
from memdesc.wiring.counts import Counts

READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
CAP_IPC_LOCK = 14
CLONE_NEWUSER = 0x10000000
MAP_NORESERVE = 0x4000

libc = ctypes.CDLL(None, use_errno=True)


def pages(count: int, prot: int = READ_WRITE, flags: int = 0) -> _core.MappedMemory:
    """Private memory with unmapped pages on both sides, so that no neighbour merges with it."""
    room = _core.reserve_memory((count + 2) * page_size)
    _core.place_memory(
        room,
        page_size,
        count * page_size,
        prot,
        _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | flags,
        -1,
        0,
    )
    return room


def at(memory: _core.MappedMemory, page: int = 0) -> int:
    """The address of a page of what `pages` gave."""
    return memory.address + (1 + page) * page_size


def unmap(memory: _core.MappedMemory, page: int, count: int) -> None:
    """Unmap behind the library's back, as the owner of a range may."""
    assert libc.munmap(ctypes.c_void_p(at(memory, page)), ctypes.c_size_t(count * page_size)) == 0


def locked() -> int:
    """Pages that the kernel has locked in this process, by its own count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmLck:"))
    return int(line.split()[1]) * 1024 // page_size


def fails(memory: _core.MappedMemory, page: int, count: int, **how: Any) -> WiringError:
    """Wire what can not be wired, and see that nothing came of it."""
    before = locked(), wired_bytes()
    with pytest.raises(WiringError) as caught:
        wire(at(memory, page), count * page_size, keep=memory, **how)
    assert (locked(), wired_bytes()) == before
    return caught.value


@pytest.fixture(autouse=True)
def nothing_wired() -> Iterator[None]:
    assert (locked(), wired_bytes(), statistics().tokens) == (0, 0, 0)
    yield
    gc.collect()
    assert (locked(), wired_bytes(), statistics().tokens) == (0, 0, 0)


# ── Claims and the kernel's count ────────────────────────────────────────────────────────────


def test_all_pages_that_the_range_touches_are_locked() -> None:
    memory = pages(4)
    with wire(at(memory, 1) - 1, 2, keep=memory) as claim:
        assert (claim.address, claim.length) == (at(memory, 0), 2 * page_size)
        assert locked() == 2
        assert wired_bytes() == 2 * page_size
        assert [wire_count(at(memory, page)) for page in range(4)] == [1, 1, 0, 0]
        resident = _core.mincore(at(memory), 4 * page_size)
        assert [byte & 1 for byte in resident] == [1, 1, 0, 0]
    assert claim.released


def test_nested_claims_stay_locked_until_the_last() -> None:
    # Linux itself does not stack: two mlock and one munlock would leave nothing locked.
    memory = pages(2)
    first = wire(at(memory), 2 * page_size, keep=memory)
    second = wire(at(memory), 2 * page_size, keep=memory)
    assert wire_count(at(memory)) == 2
    first.release()
    assert (locked(), wire_count(at(memory))) == (2, 1)
    second.release()
    assert (locked(), wire_count(at(memory))) == (0, 0)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_overlapping_claims_released_in_every_order(order: tuple[int, ...]) -> None:
    memory = pages(8)
    spans = [(0, 5), (2, 7), (4, 8)]
    claims = [wire(at(memory, low), (high - low) * page_size, keep=memory) for low, high in spans]
    left = set(range(3))
    for number in order:
        claims[number].release()
        left.remove(number)
        covered = {page for one in left for page in range(*spans[one])}
        assert locked() == len(covered)


spans = st.tuples(st.integers(0, 23), st.integers(1, 24)).map(
    lambda pair: (pair[0], min(24, pair[0] + pair[1]))
)


@given(st.lists(st.one_of(spans, st.integers(0, 30)), max_size=25))
@settings(max_examples=60, deadline=None)
def test_any_history_equals_a_count_per_page(history: list[tuple[int, int] | int]) -> None:
    memory = pages(24)
    claims: list[tuple[Wire, range]] = []
    counts = [0] * 24
    for step in history:
        if isinstance(step, tuple):
            claim = wire(at(memory, step[0]), (step[1] - step[0]) * page_size, keep=memory)
            claims.append((claim, range(*step)))
            for page in range(*step):
                counts[page] += 1
        elif claims:
            claim, covered = claims.pop(step % len(claims))
            claim.release()
            for page in covered:
                counts[page] -= 1
        assert [wire_count(at(memory, page)) for page in range(24)] == counts
        assert locked() == sum(count > 0 for count in counts)
        assert wired_bytes() == locked() * page_size
    for claim, _ in claims:
        claim.release()
    assert locked() == 0


@given(st.lists(st.tuples(spans, st.booleans()), max_size=40), spans, st.integers(0, 3))
@settings(deadline=None)
def test_the_counts_alone_equal_a_naive_model(
    changes: list[tuple[tuple[int, int], bool]], asked: tuple[int, int], wanted: int
) -> None:
    counts, model = Counts(), [0] * 25
    for (low, high), up in changes:
        if not up and min(model[low:high]) == 0:
            continue
        counts.change(low, high, 1 if up else -1)
        for place in range(low, high):
            model[place] += 1 if up else -1
    assert [counts.at(place) for place in range(25)] == model
    runs = counts.runs(*asked, wanted)
    covered = [place for low, high in runs for place in range(low, high)]
    assert covered == [place for place in range(*asked) if model[place] == wanted]
    assert all(runs[i][1] < runs[i + 1][0] for i in range(len(runs) - 1))  # maximal


def test_the_cost_is_in_intervals_not_in_pages() -> None:
    counts = Counts()
    for gib in range(1, 33):
        counts.change(gib << 30, (gib + 2) << 30, +1)
    assert len(counts._steps) <= 5
    for gib in range(1, 33):
        counts.change(gib << 30, (gib + 2) << 30, -1)
    assert counts._steps == [(0, 0)]


def test_shared_memory_and_a_file_can_be_wired() -> None:
    fd = os.memfd_create("wired")
    os.ftruncate(fd, 3 * page_size)
    memory = _core.map_memory(0, 3 * page_size, _core.PROT_READ, _core.MAP_SHARED, fd, 0)
    os.close(fd)
    with wire(memory.address, memory.length, keep=memory):
        assert locked() == 3


def test_huge_pages_can_be_wired_though_the_kernel_does_not_count_them() -> None:
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    try:
        size = os.fstat(fd).st_blksize
        os.ftruncate(fd, size)
        memory = _core.map_memory(0, size, READ_WRITE, _core.MAP_SHARED, fd, 0)
    except OSError as error:
        pytest.skip(f"no huge page to be had: {error}")
    finally:
        os.close(fd)
    with wire(memory.address, size, keep=memory):
        assert (locked(), wired_bytes()) == (0, size)


def test_statistics_count_calls_and_remember_the_peak() -> None:
    memory = pages(2)
    before = statistics()
    with wire(at(memory), 2 * page_size, keep=memory), wire(at(memory), 1, keep=memory):
        now = statistics()
        assert (now.tokens, now.wires - before.wires) == (2, 2)
        assert now.wired_bytes == 2 * page_size
    fails(memory, 0, 3)
    after = statistics()
    assert after.failures - before.failures == 1
    assert after.peak_bytes >= 2 * page_size
    assert (after.tokens, after.wired_bytes) == (0, 0)


# ── Releasing ────────────────────────────────────────────────────────────────────────────────


def test_releasing_again_does_nothing() -> None:
    memory = pages(1)
    kept = wire(at(memory), 1, keep=memory)
    claim = wire(at(memory), 1, keep=memory)
    claim.release()
    claim.release()
    assert locked() == 1
    kept.release()


def test_a_dropped_claim_is_released_also_in_a_cycle() -> None:
    memory = pages(2)
    claim = wire(at(memory), 1, keep=memory)
    del claim
    assert locked() == 0
    cycle: list[Any] = [wire(at(memory), 1, keep=memory)]
    cycle.append(cycle)
    del cycle
    assert locked() == 1
    gc.collect()
    assert locked() == 0


def test_a_claim_keeps_the_memory_mapped_and_lets_go_of_it() -> None:
    class Owner:
        def __init__(self) -> None:
            self.memory = pages(1)

    owner = Owner()
    gone = weakref.ref(owner)
    claim = wire(at(owner.memory), 1, keep=owner)
    del owner
    assert gone() is not None
    claim.release()
    assert gone() is None


def test_what_was_kept_may_wire_and_release_when_it_goes() -> None:
    memory = pages(2)
    inner: list[Wire] = []

    class Owner:
        def __del__(self) -> None:
            inner.append(wire(at(memory, 1), 1, keep=memory))

    claim = wire(at(memory), 1, keep=Owner())
    claim.release()
    assert locked() == 1
    inner.pop().release()


def test_a_claim_is_not_copied_or_pickled() -> None:
    memory = pages(1)
    with wire(at(memory), 1, keep=memory) as claim:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                attempt(claim)


def test_releasing_what_was_unmapped_in_part_unlocks_the_rest() -> None:
    # munlock stops at the first hole: what lies behind it must not stay locked.
    memory = pages(6)
    claim = wire(at(memory), 6 * page_size, keep=memory)
    unmap(memory, 2, 1)
    assert locked() == 5
    claim.release()
    assert locked() == 0
    assert wired_bytes() == 0


def test_releasing_what_was_unmapped_whole_is_no_error() -> None:
    memory = pages(2)
    claim = wire(at(memory), 2 * page_size, keep=memory)
    unmap(memory, 0, 2)
    assert locked() == 0
    claim.release()
    assert wired_bytes() == 0


def test_pages_that_munlock_refuses_are_reported() -> None:
    memory = pages(2)
    claim = wire(at(memory), 2 * page_size, keep=memory)
    before = statistics().not_unlocked
    with failing("munlock", errno.ENOMEM, times=None) as fault:
        claim.release()
    assert fault.failures == 2
    assert statistics().not_unlocked - before == 2 * page_size
    assert locked() == 2
    unmap(memory, 0, 2)


def test_a_claim_that_is_alive_at_the_end_of_the_process_is_no_trouble() -> None:
    program = """
from memdesc import _core
from memdesc.wiring import wire
flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
memory = _core.map_memory(0, 1, _core.PROT_READ, flags, -1, 0)
kept = wire(memory.address, 1, keep=memory)
cycle = [wire(memory.address, 1, keep=memory)]
cycle.append(cycle)
import builtins
builtins.kept_to_the_end = wire(memory.address, 1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


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


# ── Signals, threads, forks ──────────────────────────────────────────────────────────────────


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    before = signal.getsignal(signal.SIGUSR1)

    def install(action: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: action())

    yield install
    signal.signal(signal.SIGUSR1, before)


def signal_in_mlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a real signal arrive in the middle of each mlock, after the pages are locked."""
    mlock = _core.mlock

    def interrupted(address: int, length: int) -> None:
        mlock(address, length)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(_core, "mlock", interrupted)


def test_a_handler_that_interrupts_wiring_may_release(
    monkeypatch: pytest.MonkeyPatch, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    memory = pages(6)
    other = wire(at(memory, 1), 3 * page_size, keep=memory)
    on_signal(other.release)
    signal_in_mlock(monkeypatch)
    with wire(at(memory), 2 * page_size, keep=memory):
        assert other.released
        assert [wire_count(at(memory, page)) for page in range(5)] == [1, 1, 0, 0, 0]
        assert locked() == 2


def test_a_handler_that_interrupts_wiring_may_not_wire(
    monkeypatch: pytest.MonkeyPatch, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    memory = pages(2)
    refused: list[MemdescError] = []

    def nested() -> None:
        with pytest.raises(MemdescError) as caught:
            wire(at(memory, 1), 1, keep=memory)
        refused.append(caught.value)

    on_signal(nested)
    signal_in_mlock(monkeypatch)
    with wire(at(memory), 1, keep=memory):
        assert [error.errno for error in refused] == [errno.EDEADLK]
        assert locked() == 1


def test_a_handler_that_raises_leaves_nothing_wired(
    monkeypatch: pytest.MonkeyPatch, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    memory = pages(4)
    on_signal(interrupt)
    with wire(at(memory, 1), 1, keep=memory):
        with monkeypatch.context() as patched:
            signal_in_mlock(patched)
            with pytest.raises(KeyboardInterrupt):
                wire(at(memory), 4 * page_size, keep=memory)
        assert locked() == 1
        with wire(at(memory), 4 * page_size, keep=memory):
            assert locked() == 4


def test_a_release_never_waits_for_another_thread_that_wires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = pages(4)
    other = wire(at(memory, 3), 1, keep=memory)
    inside, go_on, mlock = threading.Event(), threading.Event(), _core.mlock

    def slow(address: int, length: int) -> None:
        inside.set()
        assert go_on.wait(30)
        mlock(address, length)

    claims: list[Wire] = []
    monkeypatch.setattr(_core, "mlock", slow)
    thread = threading.Thread(
        target=lambda: claims.append(wire(at(memory), 1, keep=memory)), daemon=True
    )
    thread.start()
    assert inside.wait(30)
    other.release()  # returns though the other thread holds the lock
    assert locked() == 1
    go_on.set()
    thread.join(30)
    assert locked() == 1  # and that thread has carried it out
    assert wire_count(at(memory, 3)) == 0
    claims.pop().release()


def test_many_threads() -> None:
    memory = pages(32)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        held: list[Wire] = []
        try:
            for _ in range(150):
                low = chance.randrange(32)
                length = chance.randrange(1, 33 - low) * page_size
                held.append(wire(at(memory, low), length, keep=memory))
                if len(held) > 3:
                    held.pop(chance.randrange(4)).release()
            for claim in held:
                claim.release()
        except BaseException as error:  # noqa: BLE001 (shown by the test's own thread)
            failures.append(error)

    with wire(at(memory, 7), 1, keep=memory):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert [wire_count(at(memory, page)) for page in (6, 7, 8)] == [0, 1, 0]
        assert locked() == 1


def test_a_fork_child_has_no_locks_and_books_of_its_own() -> None:
    memory = pages(4)
    inherited = wire(at(memory), 2 * page_size, keep=memory)

    def child() -> None:
        assert (locked(), wired_bytes(), statistics().tokens) == (0, 0, 0)
        assert inherited.released
        with wire(at(memory), 1, keep=memory):
            assert (locked(), wire_count(at(memory))) == (1, 1)
            inherited.release()  # the parent's claim: nothing of the child's
            assert (locked(), wire_count(at(memory))) == (1, 1)
        assert locked() == 0

    in_child(child)
    assert (locked(), wire_count(at(memory))) == (2, 1)
    inherited.release()


def test_a_fork_while_another_thread_wires(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pages(2)
    inside, go_on, mlock = threading.Event(), threading.Event(), _core.mlock

    def slow(address: int, length: int) -> None:
        inside.set()
        assert go_on.wait(30)
        mlock(address, length)

    def work() -> None:
        with wire(at(memory), 1, keep=memory):
            pass

    with wire(at(memory), 1, keep=memory):  # so that the handler of forks is there
        pass
    monkeypatch.setattr(_core, "mlock", slow)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert inside.wait(30)
    monkeypatch.setattr(_core, "mlock", mlock)

    def child() -> int:
        with wire(at(memory), 1, keep=memory):  # the lock of the parent's thread is not ours
            return locked()

    assert in_child(child, timeout=20) == 1
    go_on.set()
    thread.join(30)
