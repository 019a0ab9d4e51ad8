"""What both directions have: for each client an end of its own queue."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket as sockets
import weakref
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    AllocationError,
    ClosedError,
    MemdescError,
    ProtocolError,
    ShareNotFoundError,
    TimedOutError,
    WiringError,
)
from memdesc.handover import close_all, pack
from memdesc.memory.memfd import fitting_name
from memdesc.queues import Consumer, Producer, create_data_queue
from memdesc.queues.layout import CONTROL, memory_for
from memdesc.services import protocol
from memdesc.services.accepting import Accepted
from memdesc.services.errands import Errands
from memdesc.services.offers import Allow
from memdesc.vm.forks import Condition
from memdesc.vm.pages import Direction

if TYPE_CHECKING:
    from memdesc.services.queues.parts import Queueing
    from memdesc.services.user_client import UserClient

log = logging.getLogger("memdesc.services")
_End = TypeVar("_End", Producer, Consumer)


@dataclass(slots=True, eq=False)
class Slot(Generic[_End]):
    """One client's queue.

    Attributes
    ----------
    dropped : int
        Entries that found no room.
    idle_rings : int
        How often in a row the client rang without an entry.
    left : int, optional
        Bytes of the data area that are still taken of a client that has gone; None: it lives.
    lined_up : bool
        Whether it is to be looked at.
    over : bool
        Whether it was struck out, and is about to be freed.
    """

    client: Accepted
    end: _End
    memory: BufferMemoryDescriptor
    dropped: int = 0
    idle_rings: int = 0
    left: int | None = None
    lined_up: bool = False
    over: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the client has closed its end, or never had one."""
        try:
            if self.end._look()[2]:
                return True
        except (ProtocolError, ClosedError):
            return True
        socket = self.end._socket
        assert socket is not None
        poll = select.poll()
        poll.register(socket, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))


@dataclass(frozen=True, slots=True)
class QueueTotal:
    """What went through the queues of all clients, those that have gone too: it never falls.

    Attributes
    ----------
    entries, nbytes : int
    dropped : int
        Entries that found no room; of a queue of direction OUT.
    """

    entries: int = 0
    nbytes: int = 0
    dropped: int = 0

    def with_(self, slot: Slot[_End]) -> QueueTotal:
        """Add what went through one."""
        done = slot.end.statistics()
        return QueueTotal(
            self.entries + done.entries, self.nbytes + done.nbytes, self.dropped + slot.dropped
        )


class ClientQueues(Generic[_End]):
    """Base of `ClientProducers` and `ClientConsumers`; made by `Service.queue`."""

    direction: Direction

    def __init__(
        self, service: Queueing, name: str, capacity: int, *, wired: bool, allow: Allow | None
    ) -> None:
        self.name: str = name
        self.nbytes: int = memory_for(capacity)  # of one client's queue
        self.capacity: int = self.nbytes - CONTROL
        self.wired: bool = wired
        self._allow: Allow | None = allow
        self._service: weakref.ref[Queueing] = weakref.ref(service)
        self._errands: Errands = service._errands
        self._changed = Condition()  # its lock is that of the books, held for moments
        self._slots: dict[Accepted, Slot[_End]] = {}
        self._counted: list[Slot[_End]] = []  # those that are in the books or drained still
        self._past = QueueTotal()  # of the others
        self._unseen: deque[Accepted] = deque()
        self._closed: bool = False
        self._inherited: bool = False

    # -- the hooks -------------------------------------------------------------------------------

    @abstractmethod
    def _make_end(self, memory: BufferMemoryDescriptor) -> tuple[_End, sockets.socket]:
        """Make the service's end, and the client's notification socket."""

    def _entered(self, slot: Slot[_End]) -> None:
        """Know of a new client's queue. With the lock of the books."""

    def _left(self, slot: Slot[_End]) -> None:
        """Know that a client's queue is in the books no more."""

    # -- what the service's program sees ---------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the service's."""
        return self._closed

    def clients(self) -> list[UserClient]:
        """List the clients that have it open."""
        with self._changed:
            return cast("list[UserClient]", list(self._slots))

    def wait_client(self, timeout: float | None = None) -> UserClient:
        """Wait for the next client that opens it.

        Raises
        ------
        TimedOutError, ClosedError
        """
        return self._changed.wait_for(self._next_client, timeout, lambda: self._no_client(timeout))

    async def wait_client_async(self, timeout: float | None = None) -> UserClient:
        """As `wait_client`, for asyncio; cancelling it loses no client."""
        return await self._changed.wait_for_async(
            self._next_client, timeout, lambda: self._no_client(timeout)
        )

    def _next_client(self) -> UserClient | None:
        if self._unseen:
            return cast("UserClient", self._unseen.popleft())
        self._check_open()
        return None

    def _no_client(self, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"no client opened queue {self.name!r} within {timeout} s", errno=errno.ETIMEDOUT
        )

    def total(self) -> QueueTotal:
        """Tell what went through it since it was made, whoever has gone since."""
        with self._changed:
            total, counted = self._past, list(self._counted)
        for slot in counted:
            total = total.with_(slot)
        return total

    def close(self) -> None:
        """End every client's queue and give up the name. Again is a no-op.

        A client still gets what is in its queue, then `PeerGoneError` (EPIPE).
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            slots = list(self._slots.values())
            self._slots.clear()
            self._unseen.clear()
            self._changed.notify_all()
        service = self._service()
        if service is not None:
            service._forget_queue(self)
        for slot in slots:
            self._count_off(slot)
            self._left(slot)
            slot.end.close()
            slot.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._slots)} clients"
        return f"<{type(self).__name__} {self.name!r}: {self.capacity:,} bytes each, {state}>"

    def _check_open(self) -> None:
        if self._inherited:
            raise ClosedError(
                f"queue {self.name!r} belongs to the parent of this forked process: make a new "
                "Service here"
            )
        if self._closed:
            raise ClosedError(f"queue {self.name!r} was closed")

    # -- clients come, on the thread of errands --------------------------------------------------

    def _open(self, client: Accepted, number: int) -> tuple[protocol.QueueOpened, list[int]]:
        """Make a client's queue, and what it is answered."""
        memory = self._allocate(client)
        fds: list[int] = []
        try:
            end, theirs = self._make_end(memory)
            fds.append(theirs.detach())
            user = client.task.credentials.uid
            portable, memory_fds = pack(memory, None, enforced=True, user=user)
            fds[:0] = memory_fds
            self._enter(Slot(client, end, memory))
        except BaseException:
            close_all(fds)
            memory.close()
            raise
        produces = self.direction is Direction.IN
        return protocol.QueueOpened(number, produces, portable), fds

    def _allocate(self, client: Accepted) -> BufferMemoryDescriptor:
        try:
            memory = create_data_queue(
                self.capacity, wired=self.wired, name=fitting_name(self.name)
            )
        except WiringError as error:  # the client is told of its own wirings only
            log.warning("service.queue_not_wired", extra={"queue": self.name, "why": str(error)})
            raise AllocationError(
                f"queue {self.name!r} of task {client.task.pid}: {error}", errno=error.errno
            ) from error
        memory.name = self.name
        return memory

    def _enter(self, slot: Slot[_End]) -> None:
        client = slot.client
        with client._lock, self._changed:
            if client._gone is not None:
                raise client._gone_again()
            if self._closed:
                raise ShareNotFoundError(f"queue {self.name!r} was closed", errno=errno.ENOENT)
            self._slots[client] = slot
            self._counted.append(slot)
            self._unseen.append(client)
            self._changed.notify_all()
            self._entered(slot)

    # -- and go ----------------------------------------------------------------------------------

    def _sweep(self, client: Accepted) -> bool:
        """Strike out a client's queue if it has no end of it; tell whether one is in the books."""
        slot = self._slots.get(client)
        if slot is None:
            return False
        if not slot.is_over:
            return True
        self._retire(slot)
        return False

    def _retire(self, slot: Slot[_End]) -> None:
        """Strike a client's queue out, and free its memory. Never waits."""
        slot.over = True
        self._strike(slot)
        slot.end.peer_gone()
        self._count_off(slot)
        self._left(slot)
        try:
            self._errands.add(lambda: self._free(slot))  # pages by the thousand: milliseconds
        except AllocationError:
            self._free(slot)

    def _free(self, slot: Slot[_End]) -> None:
        slot.memory.close()  # the rest goes with the end, whoever has it

    def _count_off(self, slot: Slot[_End]) -> None:
        """Keep what went through a client's queue that ends."""
        with self._changed:
            if slot in self._counted:
                self._counted.remove(slot)
                self._past = self._past.with_(slot)

    def _strike(self, slot: Slot[_End]) -> None:
        with self._changed:
            if self._slots.get(slot.client) is slot:
                del self._slots[slot.client]
            with contextlib.suppress(ValueError):  # the program has seen it
                self._unseen.remove(slot.client)

    def _failed(self, slot: Slot[_End], error: MemdescError) -> None:
        """Know that a client has ended its queue, or writes nonsense into it."""
        if isinstance(error, ProtocolError):
            self._corrupt(slot, str(error))
        else:
            self._retire(slot)

    def _corrupt(self, slot: Slot[_End], why: str) -> None:
        """Drop a client that does with its queue what none may do."""
        task = slot.client.task
        log.warning(
            "service.queue_corrupt", extra={"queue": self.name, "pid": task.pid, "why": why}
        )
        self._retire(slot)
        slot.client._drop(f"of queue {self.name!r}: {why}")

    def _gone(self, client: Accepted) -> None:
        """Know that a client has gone. On the I/O thread."""
        slot = self._slots.get(client)
        if slot is not None:
            self._retire(slot)

    def forked(self) -> None:
        """In a fork child: the queues stay the parent's."""
        self._changed = Condition()
        self._closed = self._inherited = True
        self._slots.clear()
        self._counted.clear()
        self._unseen.clear()
