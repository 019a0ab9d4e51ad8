"""What both ends of a queue have: opening, waiting, closing, and what they tell of themselves."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Self

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import ClosedError, InvalidArgument, PeerGoneError, ProtocolError, TimedOutError
from memdesc.queues.layout import CONTROL, MAX_CAPACITY
from memdesc.queues.notify import clear, own_socket
from memdesc.vm import tracing
from memdesc.vm.awaiting import Sleepers, happens, readable
from memdesc.vm.forks import lock_for, tell_child
from memdesc.vm.pages import Access, page_size
from memdesc.vm.task import Task, check_task
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    import socket as sockets

GLANCE = 0.25
"""Seconds that a wait sleeps before it looks whether the other end still lives."""

_GLANCE_NS = int(GLANCE * 1e9)
_EVER = 1e6  # seconds: what a lock, and the core, take as a timeout
_OPEN, _INHERITED = 1, 3


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What one end did since it was opened.

    Attributes
    ----------
    entries, nbytes : int
        Put in or taken out; without what an entry takes beside its bytes.
    waits : int
        Calls that found no room, or no entry, and waited.
    sleeps : int
        How often one of them slept; the others met the other end while they spun.
    notifications : int
        How often this end woke the other.
    """

    entries: int
    nbytes: int
    waits: int
    sleeps: int
    notifications: int


def _told(end: End) -> tracing.Told:
    return None if end.closed else (end.name, end.capacity)


class End(_core.RingEnd):
    """Base of both ends. `_OTHER` is what the other one is called."""

    _OTHER = ""
    _keeps: object = None
    """What lives as long as this end is open: the connection that it came by."""

    def _open(
        self,
        descriptor: MemoryDescriptor,
        peer: Task | None,
        socket: sockets.socket | None,
        spin: float,
        *,
        produces: bool,
    ) -> None:
        """Map the queue; called once."""
        check_descriptor(descriptor, "descriptor")
        if peer is not None:
            check_task(peer)
        if not 0 <= spin <= 1:
            raise InvalidArgument(f"spin is {spin!r}: give seconds from 0 to 1", errno=errno.EINVAL)
        self.name = descriptor.name
        self.capacity = descriptor.length - CONTROL
        self._descriptor, self._peer, self._spin = descriptor, peer, int(spin * 1e9)
        self._died = False
        self._lock = lock_for(self)
        self._sleepers = Sleepers()
        self._listening = False
        window = _map(descriptor, self.capacity)
        self._socket = own_socket(socket)
        fd = -1 if self._socket is None else self._socket.fileno()
        if not self._begin(window, page_size, self.capacity, produces, fd):
            if self._socket is not None:
                self._socket.close()
            raise ProtocolError(
                f"{self.name!r} is no queue, or its other end wrote nonsense: make one with "
                "create_data_queue()",
                errno=errno.EPROTO,
            )
        tell_child(self)  # two ends with one position would overwrite each other
        if tracing.books is not None:
            tracing.books.note(self, _told)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._state() != _OPEN

    def close(self) -> None:
        """Be done: the other side is told. Again is a no-op.

        What is in the queue can still be taken out; views that `peek` gave stay valid. Waits of
        other threads at this end finish with `ClosedError`, within 0.25 s.
        """
        self._close()
        if self._socket is not None:
            self._socket.close()
        self._keeps = None
        self._wake()

    def peer_gone(self) -> None:
        """Say that the other end's task has ended, as whoever knows it saw: a socket, a pidfd.

        From here on calls behave as if it had closed its end, with ECONNRESET. Waits notice within
        0.25 s.
        """
        self._died = True
        self._set_gone()
        self._wake()

    def statistics(self) -> QueueStatistics:
        """Tell what this end did."""
        entries, nbytes, rung, waits, sleeps = self._counts()
        return QueueStatistics(entries, nbytes, waits, sleeps, rung)

    def __del__(self) -> None:
        # The base says goodbye too, but only when the socket has gone: at a number of another's.
        if self._state() == _OPEN:
            self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<{type(self).__name__} of {self.name!r}: {self.capacity:,} bytes{state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_until(self, wanted: int, deadline: float | None) -> bool:
        """Wait until the other end is at `wanted`, or has ended; False: the time ran out.

        Signal handlers run meanwhile, and may raise.
        """
        return self._spin_until(wanted, deadline) or self._sleep_until(wanted, deadline)

    def _sleep_until(self, wanted: int, deadline: float | None) -> bool:
        """As `_wait_until`, without spinning. Who sleeps already is waited for first."""
        lock = self._lock
        if not lock.acquire(blocking=False) and not lock.acquire(timeout=time_left(deadline)):
            return False
        try:
            while limit := _GLANCE_NS if deadline is None else _part_of(deadline):
                reached = self._sleep(wanted, limit)
                self._wake()  # an end has one wish at a time, which was this thread's
                if reached:
                    return True
                if self._peer is not None and not self._peer.alive:
                    self.peer_gone()
            return False
        finally:
            lock.release()

    def _socket_fileno(self) -> int:
        """Give the number of the socket, by which the other end wakes an event loop from here on.

        Raises
        ------
        InvalidArgument
            This end was made without a socket.
        ClosedError
        """
        if self.closed:
            self._closed()
        if self._socket is None:
            raise InvalidArgument(
                f"this end of queue {self.name!r} has no socket for an event loop to wait on: make "
                "it with one of notification_pair()",
                errno=errno.EINVAL,
            )
        self._listen()
        self._listening = True
        return self._socket.fileno()

    async def _awaited(self) -> None:
        """Wait in an event loop until there may be something to do, or this end was closed."""
        if self._listening:
            await readable(self._socket_fileno, self._sleepers)
        else:  # what was looked for has not been asked for yet
            self._socket_fileno()

    async def _wait_async(
        self, there: Callable[[], bool], wanted: Callable[[], int], timeout: float | None
    ) -> bool:
        """Wait in an event loop until something is there, or ask for that position; False: time."""

        def look() -> bool:
            if there():
                return True
            self._clear()
            self._want(wanted())
            if not there():
                return False
            self._wake()  # that it came was told meanwhile, perhaps, and cleared
            return True

        return await happens(look, self._awaited, timeout)

    def _clear(self) -> None:
        """Read the socket empty, before asking for another byte."""
        over = self._socket is not None and not clear(self._socket)
        if over and not self._look()[2]:  # who closed its end said so before its socket went
            self.peer_gone()

    def _wake(self) -> None:
        """Have all who await look again."""
        if self._sleepers:
            self._sleepers.wake()

    @staticmethod
    def _deadline(timeout: float) -> float:
        """When a call has to be over."""
        check_timeout(timeout)
        return time.monotonic() + timeout

    def _timed_out(self, timeout: float | None, what: str) -> TimedOutError:
        return timed_out(timeout, f"queue {self.name!r}: {what}")

    def _closed(self) -> NoReturn:
        if self._state() == _INHERITED:
            raise ClosedError(
                f"this end of queue {self.name!r} belongs to the parent of this forked process: "
                "make a queue for each pair of processes"
            )
        raise ClosedError(f"this end of queue {self.name!r} was closed")

    def _broke(self) -> NoReturn:
        raise ProtocolError(
            f"the {self._OTHER} of queue {self.name!r} wrote positions or sizes that can not be: "
            "nothing more can be had from it; make a new queue",
            errno=errno.EPROTO,
        )

    def _ended(self) -> NoReturn:
        if self._died:
            raise PeerGoneError(
                f"the {self._OTHER} of queue {self.name!r} has ended: make a new queue, or have "
                f"another {self._OTHER} take this one up",
                errno=errno.ECONNRESET,
            )
        raise PeerGoneError(
            f"the {self._OTHER} of queue {self.name!r} closed its end", errno=errno.EPIPE
        )


def _map(descriptor: MemoryDescriptor, capacity: int) -> _core.Window:
    """Map the pages of both ends, and the data area twice in a row."""
    if not page_size <= capacity <= MAX_CAPACITY or capacity % page_size:
        raise InvalidArgument(
            f"{descriptor.name!r} of {descriptor.length:,} bytes is no queue: make one with "
            "create_data_queue()",
            errno=errno.EINVAL,
        )
    data = SubMemoryDescriptor(descriptor, CONTROL)
    twice = MultiMemoryDescriptor([descriptor, data]).map(access=Access.READ_WRITE, unique=True)
    window = twice._export()
    if not isinstance(window, _core.Window):
        raise InvalidArgument(
            f"{descriptor.name!r} is private memory: make a queue with create_data_queue()",
            errno=errno.EINVAL,
        )
    return window


def time_left(deadline: float | None) -> float:
    """Seconds; a long time for ever."""
    return _EVER if deadline is None else min(max(deadline - time.monotonic(), 0.0), _EVER)


def timed_out(timeout: float | None, what: str) -> TimedOutError:
    """What a wait ends with."""
    if timeout:
        return TimedOutError(f"{what} in {timeout} s", errno=errno.ETIMEDOUT)
    return TimedOutError(f"{what} now, and no time to wait was given", errno=errno.EAGAIN)


def _part_of(deadline: float) -> int:
    """Nanoseconds to sleep before the next glance; 0 where the time has run out."""
    return int(min(time_left(deadline), GLANCE) * 1e9)
