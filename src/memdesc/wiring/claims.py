"""Claims on ranges of this task's memory: locking, counting, and undoing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, final

from memdesc import _core
from memdesc.errors import AllocationError, InvalidArgument, MemdescError
from memdesc.vm import regions, tracing
from memdesc.vm.pages import check_integer, page_span
from memdesc.wiring import causes
from memdesc.wiring.counts import Counts, Run


@dataclass(frozen=True, slots=True)
class WiringStatistics:
    """What this process has wired through this module.

    Attributes
    ----------
    wired_bytes, peak_bytes : int
        Bytes under at least one claim: now, and the most there ever were.
    tokens : int
        Claims not yet released.
    wires, failures : int
        Calls of `wire` that succeeded, and that failed in the kernel, since the process began.
    not_unlocked : int
        Bytes that munlock refused to unlock (at vm.max_map_count it can not split a region):
        they stay locked until they are unmapped.
    """

    wired_bytes: int
    peak_bytes: int
    tokens: int
    wires: int
    failures: int
    not_unlocked: int


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    start: int
    end: int
    keep: object


class _Books:
    """The counts of one process, and the releases not yet carried out.

    A claim may be released at any instruction: by the garbage collector or a signal handler,
    also while the same thread is in the middle of a change here. So a release never waits. It
    is put in a queue, and carried out by whoever is inside (before leaving, or just after:
    `settle` looks again once the lock is free) or, when nobody is, at once. The lock is
    reentrant and `_busy` tells a thread that it has met itself: a release then leaves its
    work to the frame below, and a `wire` is refused where a plain lock would hang for ever.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.wired = self.peak = self.tokens = self.wires = self.failures = 0
        self.not_unlocked = 0
        self.abandoned = False  # true in a fork child, for the books of its parent
        self._queue: deque[_Claim] = deque()
        self._lock = threading.RLock()
        self._busy = False

    def add(self, claim: _Claim, doing: str) -> Wire:
        token = Wire(self, claim)
        settled: list[_Claim] = []
        try:
            with self._lock:
                if self._busy:
                    raise _met_itself(doing)
                self._busy = True
                try:
                    self._drain(settled)
                    fresh = self.counts.runs(claim.start, claim.end, 0)
                    self._lock_runs(fresh, doing)
                    self.counts.change(claim.start, claim.end, +1)
                    token._claims.append(claim)
                    self._count_added(fresh)
                finally:
                    self._busy = False
        finally:
            self.settle()
        return token

    def _lock_runs(self, runs: list[Run], doing: str) -> None:
        """Lock all of `runs`, or raise with none of them locked."""
        tried: list[Run] = []
        try:
            causes.check_memory(runs, doing)
            for start, end in runs:
                tried.append((start, end))
                _core.mlock(start, end - start)
        except BaseException as error:
            self.failures += 1
            for start, end in tried:
                # mlock that meets a hole has locked what lies before it. munlock stops at the
                # same hole, so it undoes just that and touches nothing behind it.
                with contextlib.suppress(OSError):
                    _core.munlock(start, end - start)
            if isinstance(error, OSError) and not isinstance(error, MemdescError):
                raise tracing.blamed(causes.explain(error, doing, tried), of=("Wire",)) from error
            raise

    def _count_added(self, fresh: list[Run]) -> None:
        self.wired += sum(end - start for start, end in fresh)
        self.peak = max(self.peak, self.wired)
        self.tokens += 1
        self.wires += 1

    @contextlib.contextmanager
    def replacing(self, start: int, end: int, doing: str) -> Iterator[bool]:
        settled: list[_Claim] = []
        try:
            with self._lock:
                if self._busy:
                    raise _met_itself(doing)
                self._busy = True
                try:
                    self._drain(settled)
                    claimed = list(self._claimed(start, end))
                    yield bool(claimed)
                    self._lock_again(claimed, doing)
                finally:
                    self._busy = False
        finally:
            self.settle()

    def _claimed(self, start: int, end: int) -> Iterator[Run]:
        """The runs of a range that any claim covers."""
        at = start
        for left, right in [*self.counts.runs(start, end, 0), (end, end)]:
            if at < left:
                yield at, left
            at = right

    def _lock_again(self, runs: list[Run], doing: str) -> None:
        for start, end in runs:
            try:
                _core.mlock(start, end - start)
            except OSError as error:
                self.failures += 1
                raise causes.explain(error, doing, [(start, end)]) from error

    def give_back(self, claim: _Claim) -> None:
        if not self.abandoned:
            self._queue.append(claim)
            self.settle()

    def settle(self) -> None:
        """Carry out the queued releases, unless somebody is inside, who then will."""
        while self._queue:
            settled: list[_Claim] = []  # what they kept alive is let go outside of the lock
            with _core.Attempt(self._lock) as free:
                if not free or self._busy:
                    return
                self._busy = True
                try:
                    self._drain(settled)
                finally:
                    self._busy = False

    def _drain(self, settled: list[_Claim]) -> None:
        while self._queue:
            # Taken off only when done: interrupted after munlock, it is done again.
            claim = self._queue[0]
            last = self.counts.runs(claim.start, claim.end, 1)
            for run in last:
                self.not_unlocked += _unlock(run)
            self.counts.change(claim.start, claim.end, -1)
            settled.append(self._queue.popleft())
            self.wired -= sum(end - start for start, end in last)
            self.tokens -= 1


def _met_itself(doing: str) -> MemdescError:
    return MemdescError(
        f"cannot {doing}: this thread is wiring already, and was interrupted by the signal handler "
        "or finalizer that asks; wire outside of it",
        errno=errno.EDEADLK,
    )


_books = _Books()
_fork_handled = False


def _start_anew() -> None:
    """In a fork child: mlock is not inherited, and a lock may be held by a thread that is not."""
    global _books
    _books.abandoned = True
    _books = _Books()


def _told(token: Wire) -> tracing.Told:
    return None if token.released else (f"{token.address:#x}", token.length)


@final
class Wire:
    """A claim that keeps a range of this task's pages resident, until it is released.

    Made by `wire`; not copied, not pickled. A context manager. One that is dropped without
    `release` is released by the collector; at the end of the process the kernel does it.

    Threads, fork: may be released by any thread, also in a signal handler; in a fork child
    releasing it does nothing, as the child's pages are not locked.

    Attributes
    ----------
    address, length : int
        The whole pages claimed, in bytes.
    """

    __slots__ = ("__weakref__", "_books", "_claims", "address", "length")

    address: int
    length: int

    def __init__(self, books: _Books, claim: _Claim) -> None:
        self._books = books
        self._claims: list[_Claim] = []  # the claim, from being wired until being released
        self.address = claim.start
        self.length = claim.end - claim.start
        if tracing.books is not None:
            tracing.books.note(self, _told)

    @property
    def released(self) -> bool:
        """Whether it no longer claims anything."""
        return not self._claims or self._books.abandoned

    def release(self) -> None:
        """Give the claim up; releasing again does nothing.

        It never waits: while another thread is just wiring, that thread carries the release
        out. Nor does it fail: when the owner has unmapped the range meanwhile, nothing of it is
        locked any more.
        """
        try:
            claim = self._claims.pop()  # one step: of two threads only one gets it
        except IndexError:
            return
        self._books.give_back(claim)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end this module's names may be gone, and the locks go with the
        # address space.
        if self._claims and not _ending():
            self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Wire is one claim on this task's memory: it can not be copied")

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"<Wire of {self.length:,} bytes at {self.address:#x}{state}>"


def wire(address: int, length: int, *, keep: object = None, for_writing: bool = False) -> Wire:
    """Wire a range of this task: bring its pages into memory and keep them there.

    Wiring nests: pages stay locked until the last claim on them is released. It is neither
    pinning (see the module) nor protection against being unmapped: give `keep` for that.

    Parameters
    ----------
    address, length : int
        Bytes of this task, 1 or more; all pages that they touch are wired.
    keep : object, optional
        What keeps the range mapped; held until the claim is released. Without it the caller
        must not unmap the range under the claim: new memory at the same addresses would
        count as wired already.
    for_writing : bool
        Require that the pages may be written (preparing for a transfer into memory).

    Returns
    -------
    Wire
        The claim, owned by the caller.

    Raises
    ------
    InvalidArgument
        Not a range of addresses.
    WiringError
        Nothing of this call stays wired; `reason` is one of: `LIMIT` (ENOMEM),
        `NOT_PRIVILEGED` (EPERM: the limit is 0), `NOT_MAPPED` (ENOMEM), `PROTECTION` (ENOMEM,
        or EACCES for writing), `TOO_MANY_MAPPINGS` (ENOMEM), `NO_MEMORY` (ENOMEM, EAGAIN).
    AllocationError
        `for_writing`, and no file descriptor is left to look at the regions with (EMFILE).
    UnsupportedError
        A filter hides mlock from this process (ENOSYS).
    MemdescError
        Called by a signal handler or finalizer that interrupted wiring in its thread (EDEADLK).

    Notes
    -----
    Linux: mlock, munlock, mincore. No privilege up to RLIMIT_MEMLOCK (often 8 MiB), none of it
    counted for a holder of CAP_IPC_LOCK. Locking takes 0.1 s per GiB of present pages. Locked
    pages that would go past a memory cgroup's limit are no error in Linux but SIGKILL, so what
    is not yet resident is held against the limits first. Each border of what is wired splits a
    region, which counts towards vm.max_map_count.

    I/O Kit: `IOMemoryDescriptor::prepare`, `vm_map_wire`; unlike there already wired pages are
    checked for writing too.

    Examples
    --------
    >>> import mmap
    >>> from memdesc.vm.pages import page_size
    >>> memory = mmap.mmap(-1, page_size)
    >>> from memdesc._core import buffer_address
    >>> with wire(buffer_address(memory)[0], 100, keep=memory) as claim:
    ...     claim.length == page_size == wired_bytes()
    True
    """
    global _fork_handled
    low, high = regions.check_range(address, length)
    start, size = page_span(low, high - low)
    doing = f"wire {size:,} bytes at {start:#x}"
    if not _fork_handled:
        _fork_handled = True
        os.register_at_fork(after_in_child=_start_anew)
    if for_writing:
        causes.check_writable(start, size, doing)
    return _books.add(_Claim(start, start + size, keep), doing)


@contextlib.contextmanager
def replacing(address: int, length: int) -> Iterator[bool]:
    """Hold all wiring still while the memory under a range is replaced, and wire what was, anew.

    Gives whether any claim covers a part of the range. The kernel's locks go with the memory.

    Raises
    ------
    WiringError
        On leaving: the new memory can not be locked. The claims stay in the books.
    MemdescError
        Called by a signal handler or finalizer that interrupted wiring in its thread (EDEADLK).
    """
    start, size = page_span(address, length)
    doing = f"wire {size:,} bytes at {start:#x} once more"
    with _books.replacing(start, start + size, doing) as claimed:
        yield claimed


def wired_bytes() -> int:
    """Bytes of this process under at least one claim (VmLck counts the same, less hugetlb)."""
    return _books.wired


def wire_count(address: int) -> int:
    """How many claims cover the page at `address`."""
    value = check_integer(address, "address")
    if value < 0:
        raise InvalidArgument(f"address is {value}: addresses are 0 or more", errno=errno.EINVAL)
    return _books.counts.at(value)


def statistics() -> WiringStatistics:
    """Tell what is wired and what became of the calls; cheap, waits for nothing."""
    books = _books
    return WiringStatistics(
        wired_bytes=books.wired,
        peak_bytes=books.peak,
        tokens=books.tokens,
        wires=books.wires,
        failures=books.failures,
        not_unlocked=books.not_unlocked,
    )


def _unlock(run: Run) -> int:
    """Unlock a range that may have holes by now; give the bytes that munlock refused.

    ENOMEM is no error of ours: the owner has unmapped part of the range, and what is not
    mapped is not locked. But munlock stops at the first hole, so the rest goes by region.
    """
    start, end = run
    try:
        _core.munlock(start, end - start)
        return 0
    except OSError:
        refused = 0
    try:
        mapped, _ = causes.own_regions(start, end)
    except AllocationError:  # no descriptor or memory left to look with
        return end - start
    for region in mapped:
        left, right = max(region.start, start), min(region.end, end)
        try:
            _core.munlock(left, right - left)
        except OSError:
            refused += right - left
    return refused
