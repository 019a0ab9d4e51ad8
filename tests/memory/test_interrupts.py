"""An interrupt at any instant of allocating, freeing and forking loses and blocks nothing."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from interrupts import interrupted
from recycling import KIB, fresh_recycler, statistics

from memdesc import BufferMemoryDescriptor, recycler
from memdesc.memory import recycler as room
from memdesc.memory.foreign import ForeignObject
from memdesc.memory.lease import held_by_others
from memdesc.vm.pages import Access

SIZE = 64 * KIB


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest's own keeps what is being finalized alive.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with fresh_recycler():
        yield


def _free() -> Callable[[], object]:
    buffer = BufferMemoryDescriptor(SIZE)
    return lambda: buffer.close()


def _trim() -> Callable[[], object]:
    for size in (SIZE, 2 * SIZE, 3 * SIZE):
        BufferMemoryDescriptor(size).close()
    return recycler.trim


def _allocate() -> Callable[[], object]:
    BufferMemoryDescriptor(SIZE).close()
    return lambda: BufferMemoryDescriptor(SIZE).close()


def _is_free(lock: Any) -> bool:
    """Whether another thread can have it."""
    got: list[bool] = []

    def attempt() -> None:
        with lock:
            got.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    return bool(got)


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [_free, _trim, _allocate])
def test_the_recycler_counts_and_holds_what_there_is(
    prepare: Callable[[], Callable[[], object]],
) -> None:
    for number in interrupted(prepare):
        gc.collect()
        told = statistics()
        there = sum(size * count for size, count in told.sizes.items())
        assert told.kept_bytes == there, f"after interrupt {number}"
        assert not room._heirs, f"after interrupt {number}: it keeps memory for good"
        assert _is_free(room._recycler._lock), f"after interrupt {number}"
        recycler.trim()
        assert statistics().kept_bytes == statistics().kept_blocks == 0


def test_no_lease_is_left_behind() -> None:
    """With one nobody could open the memory, its owner neither, for 45 seconds."""
    with BufferMemoryDescriptor(SIZE) as buffer:
        object_ = buffer.memory
        strikes = 0
        for _ in interrupted(lambda: lambda: held_by_others(object_.own_fd())):
            with buffer.map(access=Access.READ_ONLY, unique=True) as mapping:
                assert mapping.length == SIZE
            strikes += 1
        assert strikes >= 3


def test_memory_that_comes_is_let_go_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for an interrupt at the very head of its constructor: then nobody has taken it yet."""
    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: told.append(it.exc_value))
    made: list[int] = []
    whole: list[ForeignObject] = []  # so that the finalizer, which none survives, is not struck

    def prepare() -> Callable[[], object]:
        made.append(os.memfd_create("came", os.MFD_ALLOW_SEALING))
        fcntl.fcntl(made[-1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return lambda: whole.append(ForeignObject(made[-1], Access.READ_ONLY))

    left = []
    for number in interrupted(prepare):
        whole.clear()
        with contextlib.suppress(OSError):
            os.close(made[-1])
            left.append(number)
    assert left == [1] and len(made) > 5
    assert told == []


FORK = """
import ctypes, functools, logging, os, signal, threading
strike = functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)
os.register_at_fork(after_in_parent=strike)  # no Python code: the next one to run is interrupted
import memdesc as md
md.BufferMemoryDescriptor(4096).snapshot().close()
try:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
except KeyboardInterrupt:
    pass
def snapshot():
    md.BufferMemoryDescriptor(4096).snapshot().close()
    print("taken", flush=True)
thread = threading.Thread(target=snapshot, daemon=True)
thread.start()
thread.join(20)
os._exit(0)
"""


@pytest.mark.slow
def test_a_signal_during_a_fork_leaves_other_threads_their_snapshots() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "taken\n", done.stderr
