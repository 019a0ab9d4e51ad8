"""Wiring: what the kernel has locked (VmLck) is what the claims say, whatever happens."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest
from children import in_child
from hypothesis import given, settings, strategies as st
from wired import (
    READ_WRITE,
    at,
    fails,
    locked,
    nothing_wired,  # noqa: F401 - a fixture for every test here
    pages,
    unmap,
)

from memdesc import _core
from memdesc.errors import (
    MemdescError,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.wiring import Wire, statistics, wire, wire_count, wired_bytes
from memdesc.wiring.counts import Counts

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
