"""Locks, fork and interrupts: a fork child gets new ones, and a fork can be held off.

Of a lock that another thread of the parent held at that moment the child has a copy that nobody
will ever release: that thread is not in the child. An interrupt, too, must leave none behind.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from memdesc.errors import TimedOutError
from memdesc.vm.timeouts import deadline_of

_T = TypeVar("_T")


class Locked(Protocol):
    """What keeps its lock as `_lock`."""

    _lock: Any


class Heir(Protocol):
    """What must be told in a fork child that it is the parent's."""

    def _inherit(self) -> None:
        """Close what must not be held there."""


class _Waiter(Protocol):
    """A lock, or an `Alarm`: that gives False where nobody hears it."""

    def release(self) -> bool | None:
        """Wake who waits."""


class Condition(_thread.RLock):  # type: ignore[misc]
    """As `threading.Condition`, but an interrupt (`KeyboardInterrupt`) never leaves it locked.

    The ``__enter__`` of the standard one is a function. One that is interrupted at its end has
    taken the lock, and nobody releases it: the next thread, that of all I/O perhaps, would wait
    for ever. This one's is the interpreter's own.
    """

    def __init__(self) -> None:
        self._waiters: deque[_Waiter] = deque()

    def wait(self, timeout: float | None = None) -> bool:
        """Release it until notified, or for so many seconds; False where the time ran out."""
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        held = self._release_save()  # type: ignore[attr-defined]
        try:
            limit = -1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
            return waiter.acquire(timeout=limit)
        finally:
            self._acquire_restore(held)  # type: ignore[attr-defined]
            with contextlib.suppress(ValueError):  # it was notified
                self._waiters.remove(waiter)

    def wait_for(
        self,
        look: Callable[[], _T | None],
        timeout: float | None,
        late: Callable[[], TimedOutError],
    ) -> _T:
        """Give what `look` gives, with the lock, once that is not None; raise `late()` after."""
        until = deadline_of(timeout)
        with self:
            while (found := look()) is None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise late()
                self.wait(left)
            return found

    async def wait_for_async(
        self,
        look: Callable[[], _T | None],
        timeout: float | None,
        late: Callable[[], TimedOutError],
    ) -> _T:
        """As `wait_for`, in an event loop: others run, and only this task waits."""
        from memdesc.vm.awaiting import Alarm, time_limit

        async with time_limit(timeout, late):
            while True:
                with self:
                    if (found := look()) is not None:
                        return found
                    alarm = Alarm()
                    self._waiters.append(alarm)
                try:
                    await alarm.wait()
                except BaseException:
                    with self:
                        try:
                            self._waiters.remove(alarm)
                        except ValueError:
                            self.notify()  # it was told, and will not look: another is to
                    raise

    def notify(self) -> None:
        """Wake one who waits."""
        while self._waiters and self._waiters.popleft().release() is False:
            pass  # an event loop that was closed: somebody else is to hear it

    def notify_all(self) -> None:
        """Wake all who wait."""
        while self._waiters:
            self._waiters.popleft().release()


class Flag:
    """As `threading.Event`, made of a `Condition` of ours."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._set = False

    def is_set(self) -> bool:
        """Whether it is."""
        return self._set

    def set(self) -> None:
        """Set it, for good."""
        with self._changed:
            self._set = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for so many seconds; tell whether it is."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._set:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            return self._set

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As `wait`, in an event loop."""
        with contextlib.suppress(TimedOutError):
            await self._changed.wait_for_async(
                lambda: self._set or None, timeout, lambda: TimedOutError("not set in time")
            )
        return self._set


_gate: Any = threading.RLock()
_holders: weakref.WeakSet[Locked] = weakref.WeakSet()
_heirs: weakref.WeakSet[Heir] = weakref.WeakSet()
_hooked = False


def lock_for(holder: Locked) -> Any:
    """Make the reentrant lock of an object, which in a fork child is replaced by a new one.

    Reentrant, as a signal handler may call what its own thread is in the middle of.
    """
    _hook()
    _holders.add(holder)
    return threading.RLock()


def tell_child(heir: Heir) -> None:
    """Have `heir._inherit()` called in every fork child, as long as it lives."""
    _hook()
    _heirs.add(heir)


@contextmanager
def no_fork() -> Iterator[None]:
    """Let `os.fork` of other threads wait: what is done inside is in a child whole, or not at all.

    A signal handler of this thread that forks is not held off. Only for what takes milliseconds.
    """
    _hook()
    with _gate:
        yield


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        # No functions of ours, at whose head the interrupt strikes that came during the fork.
        os.register_at_fork(
            before=_gate.acquire, after_in_parent=_gate.release, after_in_child=_gate.release
        )
        os.register_at_fork(after_in_child=_renew)
        os.register_at_fork(after_in_child=_inherit)


def _renew() -> None:
    if _gate.acquire(blocking=False):
        _gate.release()
    else:  # an interrupt ended the waiting for another thread, which is not in the child
        _gate._at_fork_reinit()
    for holder in list(_holders):
        holder._lock = threading.RLock()


def _inherit() -> None:
    for heir in list(_heirs):
        heir._inherit()
