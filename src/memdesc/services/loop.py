"""The one I/O thread of a process that has services or connections.

A daemon, started with the first of them, never at import. It answers pushed mappings, notices
deaths, and delivers answers while the program computes. Handlers run on it one after the other
and must not wait for a peer.

Fork: the child has neither thread nor sockets; what it inherited of them is closed there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from memdesc import mapping

log = logging.getLogger("memdesc.services")
THREAD_NAME = "memdesc-io"


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
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether the caller is the I/O thread itself."""
        return threading.current_thread() is self._thread

    def post(self, call: Callable[[], None]) -> None:
        """Have something called on the I/O thread, soon."""
        self._posted.append(call)
        os.eventfd_write(self._wake, 1)

    def run(self, call: Callable[[], None]) -> None:
        """Have something called on the I/O thread, and wait until it was."""
        if self.here:
            call()
            return
        done = threading.Event()

        def then() -> None:
            try:
                call()
            finally:
                done.set()

        self.post(then)
        done.wait()

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

    def _drain(self, _: int) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._call(self._posted.popleft())

    def _run(self) -> None:
        while True:
            for key, events in self._selector.select():
                self._call(key.data, events)

    def _call(self, call: Callable[..., None], *args: int) -> None:
        """One handler's bug must not end the thread that all connections of the process need."""
        try:
            call(*args)
        except Exception:
            log.exception("loop.handler_failed")

    def forked(self) -> None:
        """Close what the child inherited of the epoll and its wake-up."""
        self._selector.close()
        os.close(self._wake)


_loop: Loop | None = None
_lock = threading.Lock()
_inherited: weakref.WeakSet[Forked] = weakref.WeakSet()
_hooked = False


def loop() -> Loop:
    """Give the process's I/O thread, started now if need be."""
    global _loop, _hooked
    with _lock:
        if _loop is None:
            _loop = Loop()
        if not _hooked:
            _hooked = True
            os.register_at_fork(after_in_child=_after_fork)
        return _loop


def tell_if_forked(what: Forked) -> None:
    """Have `what.forked()` called in every fork child, as long as it lives."""
    _inherited.add(what)


def _after_fork() -> None:
    global _loop, _lock
    _lock = threading.Lock()
    mapping.forget_carriers()
    for what in list(_inherited):
        what.forked()
    _inherited.clear()
    if _loop is not None:
        _loop.forked()
        _loop = None
