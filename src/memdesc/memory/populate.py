"""Faulting pages in, so that no program waits for them later: reserved or refused.

Several CPUs fault at once, without the interpreter lock; between steps signals and errors are
seen. Past a limit Linux kills, so the limits are asked before each round. What each way costs is
told in `docs/pages.md`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from memdesc import _core
from memdesc.errors import AllocationError, describe_errno
from memdesc.memory.limits import check_available
from memdesc.vm.pages import page_size

_ROUND = 64 << 20
"""Bytes faulted in between two looks at the limits."""
_STEP = 1 << 20
"""Bytes that a thread faults in between two looks at signals and at the others' errors."""
_WORTH = 4 << 20
"""Bytes of base pages for which another thread pays: 1.5 ms of work for 0.1 ms to start it."""
_WORTH_HUGE = 32 << 20
"""The same of huge pages, which cost a tenth."""
_MOST_WORKERS = 8

Work = Callable[[int, int], None]
"""What is done to (offset, length)."""


class Reserving(Protocol):
    """A memory object that takes its pages when told to."""

    def reserve(self, offset: int, length: int) -> None:
        """Take the pages of a range (fallocate), or raise OSError."""


def populate(object_: Reserving | None, offset: int, address: int, length: int, doing: str) -> None:
    """Fault in pages of the size that the kernel chooses, base pages as a rule.

    The caller has asked the limits for all of it (`check_available`); they are asked again on the
    way.

    Parameters
    ----------
    object_ : Reserving, optional
        Whose pages they are. None has the faults choose the size: reserving knows no MADV_HUGEPAGE.
    offset, length : int
        The range of the object: whole pages.
    address : int
        Where it is mapped writable in this task.
    doing : str
        What is being done, for the message of an error.

    Raises
    ------
    AllocationError
        `available` is what there is, or what the kernel gave. What was taken stays taken.
    """
    for start in range(0, length, _ROUND):
        size = min(_ROUND, length - start)
        if start:
            check_available(size, doing)
        workers = workers_for(size, _WORTH)
        try:
            if workers > 1:
                in_parallel(_populating(address + start), size, _STEP, workers)
            else:
                _reserve_and_populate(object_, offset + start, address + start, size)
        except OSError as error:
            raise AllocationError(
                f"{doing}: the kernel gave some {start:,} of {length:,} bytes, then "
                f"{describe_errno(error)}: ask for less, or say lazy=True to take pages at the "
                "first touch",
                errno=error.errno,
                requested=length,
                available=start,
            ) from error


def populate_huge(address: int, length: int) -> None:
    """Fault in pages of the huge-page pool, which the mapping has reserved already; OSError."""
    workers = max(workers_for(length, _WORTH_HUGE), 1)
    in_parallel(_populating(address), length, _WORTH_HUGE // 2, workers)


def workers_for(length: int, worth: int) -> int:
    """Tell how many threads such a length is worth, given what it is for one; 0 if none."""
    most = min(_MOST_WORKERS, length // worth)
    return min(len(os.sched_getaffinity(0)), most) if most > 1 else most


def _populating(address: int) -> Work:
    def work(offset: int, length: int) -> None:
        _core.madvise(address + offset, length, _core.MADV_POPULATE_WRITE)

    return work


def _reserve_and_populate(
    object_: Reserving | None, offset: int, address: int, length: int
) -> None:
    """On one thread reserving first is a fifth faster; on several they would wait for it."""
    done, step = 0, _STEP
    while done < length:
        size = min(step, length - done)
        try:
            if object_ is not None:
                object_.reserve(offset + done, size)
            _core.madvise(address + done, size, _core.MADV_POPULATE_WRITE)
            done += size
        except InterruptedError:  # some kernels stop for any signal; its handler runs here
            step = max(step // 2, page_size)


def in_parallel(work: Work, length: int, step: int, workers: int) -> None:
    """Do work on all steps of a length: this thread, and as many others as can be had.

    Raises what failed first. After a failure, or an interrupt of this thread, nobody begins
    another step, and this returns when the steps that were begun are done.
    """
    offsets = iter(range(0, length, step))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not failed and (offset := next(offsets, None)) is not None:  # one at a time: GIL
                work(offset, min(step, length - offset))
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that asked)
            failed.append(error)

    helpers = _Helpers(run)
    try:
        helpers.start(workers - 1)
    except BaseException as error:  # noqa: BLE001 (raised below, when the others have stopped)
        failed.append(error)
    run()
    while True:
        try:
            helpers.wait()
            break
        except BaseException as error:  # noqa: BLE001 (an interrupt: it comes after them)
            failed.append(error)
    try:
        if failed:
            raise failed[0]
    finally:
        failed.clear()  # see telling


class _Helpers:
    """Threads that run one function.

    They tell themselves that they have begun and ended: where an interrupt strikes `start`, nobody
    knows whether there is a thread, and where it strikes `join`, CPython 3.11 takes it for ended.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._threads: list[threading.Thread] = []
        self._sure = 0  # that were started, and no interrupt came in between
        self._begun: list[None] = []
        self._ended: list[None] = []
        self._change = threading.Lock()
        self._change.acquire()

    def start(self, count: int) -> None:
        """Start up to so many."""
        for _ in range(count):
            thread = threading.Thread(target=self._work, name="memdesc-populate", daemon=True)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads here: those that there are do it
                self._threads.pop()
                return
            self._sure += 1

    def _work(self) -> None:
        self._begun.append(None)
        self._run()
        self._ended.append(None)
        with contextlib.suppress(RuntimeError):  # another has told of a change just now
            self._change.release()

    def wait(self) -> None:
        """Wait until all have ended. After an interrupt it can be called again."""
        until = time.monotonic() + 0.5  # for one that may have been started
        while (
            len(self._begun) < self._sure
            or len(self._ended) < len(self._begun)
            or (len(self._begun) < len(self._threads) and time.monotonic() < until)
        ):
            self._change.acquire(timeout=0.05)  # an interrupt may have lost us a change
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
