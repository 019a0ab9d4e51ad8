"""Faulting in: reserved or refused, on several threads, and what interrupts and errors leave."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memdesc import AllocationError, BufferMemoryDescriptor, PageKind, _core, page_size
from memdesc.memory import limits, populate
from memdesc.memory.populate import in_parallel
from memdesc.testing.faults import failing

SIZE = 4 * page_size
FRESH: Any = {"pages": PageKind.BASE, "recycle": False}
MIB = 1 << 20


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "memdesc-populate"}


def is_mapped(name: str) -> bool:
    return f"/memfd:{name}" in Path("/proc/self/maps").read_text()


@pytest.fixture
def several_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have threads work where this machine has one CPU too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


# ── Reserved or refused ──────────────────────────────────────────────────────────────────────


def test_what_is_made_is_all_there() -> None:
    for size in (1, SIZE, 9 * MIB + 1):
        with BufferMemoryDescriptor(size, **FRESH) as buffer:
            counts = buffer.page_counts()
            assert counts.resident == counts.total == -(-size // page_size)
            assert os.fstat(buffer.memory.fileno()).st_blocks * 512 == counts.total * page_size


def test_lazy_memory_takes_no_page() -> None:
    for pages in (PageKind.AUTO, PageKind.BASE, PageKind.TRANSPARENT_HUGE):
        try:
            buffer = BufferMemoryDescriptor(9 * MIB, lazy=True, pages=pages)
        except AllocationError as error:
            assert (pages, error.errno) == (PageKind.TRANSPARENT_HUGE, errno.EINVAL)
            continue
        assert os.fstat(buffer.memory.fileno()).st_blocks == 0
        buffer.close()


def test_what_the_kernel_refuses_half_way_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "_ROUND", page_size)
    with failing("fallocate", errno.ENOSPC, after=3) as fault:
        with pytest.raises(AllocationError) as caught:
            BufferMemoryDescriptor(SIZE, name="half", **FRESH)
    assert fault.failures == 1
    assert caught.value.errno == errno.ENOSPC
    assert (caught.value.requested, caught.value.available) == (SIZE, 3 * page_size)
    del caught  # its traceback holds the half-made buffer
    assert not is_mapped("half")


def test_the_limits_are_asked_again_before_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check(nbytes: int, doing: str, pages: PageKind = PageKind.BASE) -> None:
        asked.append(nbytes)
        limits.check_available(nbytes, doing, pages)

    monkeypatch.setattr(populate, "_ROUND", page_size)
    monkeypatch.setattr(populate, "check_available", check)
    monkeypatch.setattr("memdesc.memory.allocation.check_available", check)
    BufferMemoryDescriptor(SIZE, **FRESH).close()
    assert asked == [SIZE] + [page_size] * 3


def test_populating_may_fail_too() -> None:
    with failing("madvise", errno.ENOMEM):
        with pytest.raises(AllocationError) as caught:
            BufferMemoryDescriptor(SIZE, name="unpopulated", **FRESH)
    assert caught.value.errno == errno.ENOMEM
    del caught
    assert not is_mapped("unpopulated")


def test_a_worker_s_failure_is_the_caller_s(several_cpus: None) -> None:
    with failing("madvise", errno.EFAULT, times=None) as fault:
        with pytest.raises(AllocationError) as caught:
            BufferMemoryDescriptor(64 * MIB, name="all-fail", **FRESH)
    assert 1 <= fault.failures <= 3  # the first of each thread
    assert caught.value.errno == errno.EFAULT
    del caught
    assert not is_mapped("all-fail")
    assert threads() == set()


# ── Work in parallel ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("length", "step"), [(1, 1), (10, 3), (9, 3), (3, 10)])
def test_every_step_is_done_once(workers: int, length: int, step: int) -> None:
    done: list[tuple[int, int]] = []
    in_parallel(lambda offset, size: done.append((offset, size)), length, step, workers)
    assert sorted(done) == [(at, min(step, length - at)) for at in range(0, length, step)]
    assert threads() == set()


def test_the_steps_run_at_once() -> None:
    """Each waits until all others have begun."""
    barrier = threading.Barrier(4)

    def work(*_: int) -> None:
        barrier.wait(20)

    in_parallel(work, 4, 1, 4)
    assert threads() == set()


class Odd(Exception):
    """No error that the library knows."""


@pytest.mark.parametrize("where", ["caller", "worker"])
def test_an_error_comes_out_as_it_is_and_ends_the_work(where: str) -> None:
    main = threading.current_thread()
    began: list[int] = []
    both = threading.Barrier(2)

    def work(offset: int, _: int) -> None:
        began.append(offset)
        if offset < 2:
            both.wait(20)
        if (threading.current_thread() is main) == (where == "caller"):
            raise Odd(offset)
        caller = sys._getframe(1)
        while not caller.f_locals["failed"]:  # of `in_parallel`
            time.sleep(0.001)

    with pytest.raises(Odd):
        in_parallel(work, 1000, 1, 2)
    assert sorted(began) == [0, 1]
    assert threads() == set()


def test_where_no_thread_can_be_had_the_caller_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    in_parallel(lambda offset, _: done.append(offset), 5, 1, 4)
    assert done == [0, 1, 2, 3, 4]


@contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_an_interrupt_of_the_caller_stops_all_soon_and_leaves_no_thread() -> None:
    began: list[int] = []
    go = threading.Event()

    def work(offset: int, _: int) -> None:
        began.append(offset)
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGUSR1)  # while the worker is in the middle of a step
        else:
            go.wait(0.05)

    with interrupted_by(signal.SIGUSR1), pytest.raises(KeyboardInterrupt):
        in_parallel(work, 10_000, 1, 2)
    assert len(began) < 10_000
    assert threads() == set()


def test_an_interrupt_while_waiting_for_the_others_comes_after_them() -> None:
    main = threading.main_thread()
    ended = []

    def work(offset: int, _: int) -> None:
        if threading.current_thread() is main:
            return
        assert main.ident is not None
        for _ in range(3):
            signal.pthread_kill(main.ident, signal.SIGUSR1)
            time.sleep(0.01)
        ended.append(offset)

    with interrupted_by(signal.SIGUSR1), pytest.raises(KeyboardInterrupt):
        for _ in range(1000):  # until a worker, and not this thread, gets a step
            in_parallel(work, 2, 1, 2)
    assert len(ended) == 1
    assert threads() == set()


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_buffer_interrupted_while_it_is_made_leaves_nothing(
    several_cpus: None, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    main, original, calls = threading.main_thread(), _core.madvise, itertools.count(1)
    assert main.ident is not None

    def madvise(address: int, length: int, advice: int) -> None:
        if next(calls) == call:
            signal.pthread_kill(main.ident or 0, signal.SIGUSR1)
        original(address, length, advice)

    monkeypatch.setattr(_core, "madvise", madvise)
    with interrupted_by(signal.SIGUSR1), pytest.raises(KeyboardInterrupt):
        BufferMemoryDescriptor(32 * MIB, name="cut", **FRESH)
    assert not is_mapped("cut")
    assert threads() == set()
