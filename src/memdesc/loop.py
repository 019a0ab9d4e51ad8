"""The one I/O thread of a process that has services or connections, or keeps what is on its way.

A daemon, started with the first of them, never at import. It answers pushed mappings, notices
deaths, and delivers answers while the program computes. Handlers run on it one after the other
and must not wait for a peer.

Fork: waits until the thread is between two handlers, so that the child finds no lock held by a
thread that it has not got. The child has neither thread nor sockets; what it inherited of them is
closed there.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from memdesc import copyio, mapping
from memdesc.errors import AllocationError, ClosedError
from memdesc.memory.closing import no_descriptor
from memdesc.vm.forks import Flag

log = logging.getLogger("memdesc.services")

THREAD_NAME = "memdesc-io"

_FORK_WAITS = 10.0
"""Seconds that a fork waits for a handler to end. One that takes longer waits for this very
thread (which forks with a lock in its hands): then going on is the lesser evil."""


class Forked(Protocol):
    """What must be told that this process is a fork child now."""

    def forked(self) -> None:
        """Close inherited descriptors without a word to the peer."""


class Loop:
    """An epoll, the callbacks of its descriptors, and calls posted from other threads."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, self._drain)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()  # of two timers at one time the first comes first
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.forked()
            raise

    @property
    def here(self) -> bool:
        """Whether the caller is the I/O thread itself."""
        return threading.current_thread() is self._thread

    def post(self, call: Callable[[], None]) -> None:
        """Have something called on the I/O thread, soon. Takes no lock: finalizers may."""
        self._posted.append(call)
        os.eventfd_write(self._wake, 1)

    def run(self, call: Callable[[], None]) -> None:
        """Have something called on the I/O thread, and wait until it was; raises what it raises."""
        if self.here:
            call()
            return
        done = Flag()
        raised: list[BaseException] = []

        def then() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 (it goes to the thread that asked)
                raised.append(error)
            finally:
                done.set()

        self.post(then)
        while not done.wait(1.0):
            if not self._thread.is_alive():  # somebody closed the descriptors under it
                raise ClosedError("the I/O thread of this process has ended")
        try:
            if raised:
                raise raised[0]
        finally:
            raised.clear()  # see telling

    def watch(self, fd: int, call: Callable[[int], None]) -> None:
        """Call with the ready events (EVENT_READ, EVENT_WRITE) of a descriptor. I/O thread only."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def want(self, fd: int, *, write: bool) -> None:
        """Watch a descriptor for room to write too, or no longer. I/O thread only."""
        key = self._selector.get_key(fd)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        if key.events != events:
            self._selector.modify(fd, events, key.data)

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor, before it is closed. I/O thread only."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something called here after that time, not before. I/O thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def _drain(self, _: int) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._call(self._posted.popleft())

    def _run(self) -> None:
        while True:
            ready = self._selector.select(self._until_next())
            with _handling:
                for key, events in ready:
                    self._call(key.data, events)
                while self._timers and self._timers[0][0] <= time.monotonic():
                    self._call(heapq.heappop(self._timers)[2])

    def _until_next(self) -> float | None:
        """Seconds until the next timer; None, and the thread sleeps, where there is none."""
        return max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None

    def _call(self, call: Callable[..., None], *args: int) -> None:
        """One handler's bug must not end the thread that all connections of the process need."""
        try:
            call(*args)
        except BaseException:
            log.exception("loop.handler_failed")

    def forked(self) -> None:
        """Close what the child inherited of the epoll and its wake-up."""
        self._selector.close()
        wake, self._wake = self._wake, -1  # its number will be another file's
        os.close(wake)


_loop: Loop | None = None
_lock = threading.Lock()
_inherited: weakref.WeakSet[Forked] = weakref.WeakSet()
_hooked = False
_handling: Any = threading.RLock()
"""Held while handlers run, and by who forks: so no handler runs during a fork."""


def loop() -> Loop:
    """Give the process's I/O thread, started now if need be; `AllocationError`: EMFILE, EAGAIN."""
    global _loop, _hooked
    with _lock:
        if _loop is None:
            try:
                _loop = Loop()
            except OSError as error:
                raise no_descriptor("start the I/O thread", error) from error
            except RuntimeError as error:
                raise AllocationError(
                    f"cannot start the I/O thread: {error}; see ulimit -u and the cgroup's "
                    "pids.max",
                    errno=errno.EAGAIN,
                ) from error
        if not _hooked:
            _hooked = True
            # No functions of ours, at whose head the interrupt strikes that came during the fork.
            # Where the lock was not had, the interpreter says on stderr that it is not to release.
            os.register_at_fork(
                before=partial(_handling.acquire, timeout=_FORK_WAITS),
                after_in_parent=_handling.release,
                after_in_child=_handling._at_fork_reinit,
            )
            os.register_at_fork(after_in_child=_in_child)
        return _loop


def tell_if_forked(what: Forked) -> None:
    """Have `what.forked()` called in every fork child, as long as it lives."""
    _inherited.add(what)


def _in_child() -> None:
    global _loop, _lock
    _lock = threading.Lock()
    mapping.forget_carriers()
    copyio.renew_lock()
    for what in list(_inherited):
        what.forked()
    _inherited.clear()
    if _loop is not None:
        _loop.forked()
        _loop = None
