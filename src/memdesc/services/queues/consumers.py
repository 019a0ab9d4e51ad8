"""Each client produces, the service consumes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as sockets
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, cast, final

from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
)
from memdesc.memory.closing import no_descriptor
from memdesc.queues import Consumer, QueueStatistics, notification_pair
from memdesc.queues.layout import entry_extent
from memdesc.services.accepting import Accepted
from memdesc.services.arrivals import Arrivals
from memdesc.services.offers import Allow
from memdesc.services.queues.books import ClientQueues, Slot
from memdesc.vm.pages import Direction
from memdesc.vm.timeouts import deadline_of

if TYPE_CHECKING:
    from memdesc.services.queues.parts import Queueing
    from memdesc.services.user_client import UserClient

_TURN = 32
"""Entries that are taken from one client before the others get their turn."""
_IDLE_RINGS = 1000
"""Times that a client may ring without an entry before it is dropped. One that keeps to the rules
rings once for nothing after an entry."""


class _Watch:
    """An epoll of the clients' sockets, and an eventfd by which this process wakes who waits.

    Closed with the last who has it, not before: of an epoll without its eventfd nobody is woken.
    """

    def __init__(self) -> None:
        try:
            self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise no_descriptor("wait for clients' queues", error) from error
        try:
            self.epoll = select.epoll()
            self.epoll.register(self.bell, select.EPOLLIN)
        except OSError as error:
            os.close(self.bell)
            raise no_descriptor("wait for clients' queues", error) from error

    def ring(self) -> None:
        os.eventfd_write(self.bell, 1)

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)

    def __del__(self) -> None:
        if hasattr(self, "epoll"):
            self.epoll.close()
            os.close(self.bell)


@final
class ClientConsumers(ClientQueues[Consumer], Arrivals["tuple[UserClient, bytes]"]):
    """A queue from each client that opens it, of which the service is the consumer.

    Iterate over it, with ``for`` or ``async for``; or `get`, `get_many`; or wait for `fileno` in
    any event loop, then `try_get` until it gives None. Clients take turns of at most 32 entries.
    Each entry comes with its client, which may have gone since: what it put before is given still,
    of all that have gone as much as one client may hold (`Limits.queue_bytes`).

    Attributes
    ----------
    name : str
    capacity : int
        Bytes of the data area of each client's queue.

    Notes
    -----
    A client that writes nonsense into its queue, or rings without end, is dropped, and the others
    notice nothing. Threads: safe; each entry goes to one. Fork: closed in the child.
    """

    direction = Direction.IN

    def __init__(
        self, service: Queueing, name: str, capacity: int, *, wired: bool, allow: Allow | None
    ) -> None:
        super().__init__(service, name, capacity, wired=wired, allow=allow)
        self._most_left = service.limits.queue_bytes
        self._watch: _Watch | None = _Watch()
        self._by_fd: dict[int, Slot[Consumer]] = {}
        self._taking = threading.RLock()  # of who takes; the I/O thread never waits for it
        self._ready: deque[Slot[Consumer]] = deque()
        self._came: deque[Slot[Consumer]] = deque()  # which the I/O thread has them look at
        self._taken = 0  # of the turn of the first of them
        self._orphans: list[Slot[Consumer]] = []  # whose clients have gone; oldest first

    # -- taking ----------------------------------------------------------------------------------

    def get(self, timeout: float | None = None) -> tuple[UserClient, bytes]:
        """Take the next entry of any client, waiting for it: (client, entry).

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.

        Raises
        ------
        TimedOutError
            None came in time (ETIMEDOUT).
        ClosedError
        """
        found = self.try_get()
        if found is None:
            until = deadline_of(timeout)
            while (found := self.try_get()) is None:
                self._wait(until, timeout)
        return found

    def try_get(self) -> tuple[UserClient, bytes] | None:
        """Take the next entry of any client, or give None where there is none now."""
        with self._taking:
            if 0 < self._taken < _TURN - 1 and not self._closed:  # in mid turn: nothing to look for
                slot = self._ready[0]
                try:
                    entry = slot.end.try_dequeue() if slot.left is None else None
                except MemdescError:
                    entry = None  # and below it comes once more
                if entry is not None:
                    self._taken += 1
                    return cast("tuple[UserClient, bytes]", (slot.client, entry))
            found = self._take(1)
        return found[0] if found else None

    def get_many(
        self, most: int = 1024, timeout: float | None = None
    ) -> list[tuple[UserClient, bytes]]:
        """Take entries that are there, at most so many; wait only for the first."""
        if most < 1:
            raise InvalidArgument(f"most is {most}: give at least 1", errno=errno.EINVAL)
        until = deadline_of(timeout)
        while not (found := self._take(most)):
            self._wait(until, timeout)
        return found

    def fileno(self) -> int:
        """Give the descriptor that an event loop waits on, an epoll. Only to be waited for.

        Readable while an entry waits, and once this is closed.
        """
        return self._watching().epoll.fileno()

    def statistics(self) -> dict[UserClient, QueueStatistics]:
        """Tell what came from each client that has it open."""
        with self._changed:
            slots = list(self._slots.values())
        return cast(
            "dict[UserClient, QueueStatistics]",
            {slot.client: slot.end.statistics() for slot in slots},
        )

    def _watching(self) -> _Watch:
        self._check_open()
        assert self._watch is not None  # but in a fork child, where it is not open
        return self._watch

    def _wait(self, until: float | None, timeout: float | None) -> None:
        watch = self._watching()
        left = -1.0 if until is None else until - time.monotonic()
        if until is not None and left <= 0:
            raise self._nothing(timeout)
        watch.epoll.poll(min(left, 1e6), 1)

    def _nothing(self, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"no client put anything into queue {self.name!r} in {timeout} s",
            errno=errno.ETIMEDOUT,
        )

    def _take(self, most: int) -> list[tuple[UserClient, bytes]]:
        """Take up to so many entries, in turns. Waits for nothing."""
        found: list[tuple[Accepted, bytes]] = []
        with self._taking:
            watch = self._watching()
            if not self._ready or not self._taken:
                self._look(watch)
            while self._ready and len(found) < most:
                slot = self._ready[0]
                entries = self._take_of(slot, min(most - len(found), _TURN - self._taken))
                found += [(slot.client, entry) for entry in entries]
                self._taken += len(entries)
                if not entries:
                    self._ready.popleft().lined_up = False
                    self._taken = 0
                elif self._taken == _TURN:
                    self._ready.rotate(-1)
                    self._taken = 0
        return cast("list[tuple[UserClient, bytes]]", found)

    def _look(self, watch: _Watch) -> None:
        """Line up the clients that rang, before who has had its turn."""
        rang = [self._by_fd.get(fd) for fd, _ in watch.epoll.poll(0, 1024)]
        while self._came:
            rang.append(self._came.popleft())
        for slot in rang:
            if slot is not None and not slot.lined_up:
                slot.lined_up = True
                self._ready.append(slot)

    def _take_of(self, slot: Slot[Consumer], most: int) -> list[bytes]:
        if slot.over:
            return []
        try:
            entries = slot.end._take_many(most)
        except (PeerGoneError, ClosedError, ProtocolError) as error:
            self._failed(slot, error)
            return []
        if slot.left is not None:
            slot.left -= sum(entry_extent(len(entry)) for entry in entries)
            if slot.left <= 0:  # what comes now comes from who has its memory still
                self._retire(slot)
        elif entries:
            slot.idle_rings = 0
        else:
            slot.idle_rings += 1
            if slot.idle_rings > _IDLE_RINGS:
                self._corrupt(slot, f"rang {_IDLE_RINGS:,} times without an entry")
        return entries

    # -- clients come and go ---------------------------------------------------------------------

    def _make_end(self, memory: BufferMemoryDescriptor) -> tuple[Consumer, sockets.socket]:
        theirs, ours = notification_pair()
        try:
            with ours:
                consumer = Consumer(memory, listen=ours)
            consumer.try_dequeue()  # empty: from now on it rings
        except BaseException:
            theirs.close()
            raise
        return consumer, theirs

    def _entered(self, slot: Slot[Consumer]) -> None:
        watch = self._watch
        if watch is not None:
            self._by_fd[_fileno(slot)] = slot
            watch.epoll.register(_fileno(slot), select.EPOLLIN)

    def _left(self, slot: Slot[Consumer]) -> None:
        watch = self._watch
        fd = _fileno(slot)
        if self._by_fd.get(fd) is slot:
            del self._by_fd[fd]
            if watch is not None:
                watch.epoll.unregister(fd)
        if slot in self._orphans:
            self._orphans.remove(slot)
            with contextlib.suppress(ValueError):  # it is lined up
                self._came.remove(slot)
            if not self._orphans and watch is not None:
                watch.hush()

    def _gone(self, client: Accepted) -> None:
        """Keep what a client put before it went, unless too much is kept already."""
        slot = self._slots.get(client)
        if slot is None:
            return
        self._strike(slot)
        slot.end.peer_gone()
        try:
            slot.left = slot.end.used
        except (ProtocolError, ClosedError):
            slot.left = 0
        if not slot.left:
            self._retire(slot)
            return
        self._orphans.append(slot)
        self._came.append(slot)
        if self._watch is not None:
            self._watch.ring()
        while sum(orphan.memory.length for orphan in self._orphans) > self._most_left:
            self._retire(self._orphans[0])

    def _free(self, slot: Slot[Consumer]) -> None:
        slot.end.close()  # it may be lined up still
        super()._free(slot)

    def _sweep(self, client: Accepted) -> bool:
        slot = self._slots.get(client)
        if slot is not None and slot.end.used:
            return True  # what it put in before it closed its end waits to be taken
        return super()._sweep(client)

    def close(self) -> None:
        """End every client's queue and give up the name. Again is a no-op.

        A client that puts on gets `PeerGoneError` (EPIPE); entries that wait are dropped.
        """
        super().close()
        for slot in list(self._orphans):
            self._retire(slot)
        if self._watch is not None:
            self._watch.ring()  # for good: all who wait see it

    def forked(self) -> None:
        """In a fork child: the queues stay the parent's."""
        super().forked()
        self._taking = threading.RLock()
        self._watch = None
        self._by_fd.clear()
        self._ready.clear()
        self._came.clear()
        self._orphans.clear()


def _fileno(slot: Slot[Consumer]) -> int:
    """Give the number of its socket; -1 where it was closed."""
    socket = slot.end._socket
    assert socket is not None
    return socket.fileno()
