"""The service produces, each client consumes."""

from __future__ import annotations

import errno
import socket as sockets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

from memdesc.copyio import bytes_of
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    ClosedError,
    PeerGoneError,
    ProtocolError,
    RangeError,
    ShareNotFoundError,
)
from memdesc.queues import Producer, notification_pair
from memdesc.queues.layout import ENTRY_HEADER
from memdesc.services.accepting import Accepted
from memdesc.services.offers import Allow
from memdesc.services.queues.books import ClientQueues, Slot
from memdesc.vm.pages import Direction

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    from memdesc.services.queues.parts import Queueing
    from memdesc.services.user_client import UserClient


@dataclass(frozen=True, slots=True)
class PutStatistics:
    """What went to one client.

    Attributes
    ----------
    entries, nbytes : int
        Put into its queue.
    dropped : int
        Entries that found no room there.
    """

    entries: int
    nbytes: int
    dropped: int


@final
class ClientProducers(ClientQueues[Producer]):
    """A queue to each client that opens it, of which the service is the producer.

    `put` offers to all of them and waits for none; who wants to wait for one client takes its
    `Producer`: ``samples[client]``.

    Attributes
    ----------
    name : str
    capacity : int
        Bytes of the data area of each client's queue.
    largest : int
        Bytes of the largest entry.

    Notes
    -----
    Threads: safe; every client sees the entries of `put` in one order. Fork: closed in the child.
    """

    direction = Direction.OUT

    def __init__(
        self, service: Queueing, name: str, capacity: int, *, wired: bool, allow: Allow | None
    ) -> None:
        super().__init__(service, name, capacity, wired=wired, allow=allow)
        self.largest = self.capacity - ENTRY_HEADER
        self._putting = threading.RLock()

    def put(self, data: Buffer) -> int:
        """Offer one entry to every client that has the queue open. Never waits.

        Who has no room for it does not get it: `statistics` counts that.

        Returns
        -------
        int
            Clients whose queue took it.

        Raises
        ------
        RangeError
            It is larger than `largest` (EMSGSIZE).
        InvalidArgument, ClosedError
        """
        self._check([memoryview(data) if isinstance(data, bytes) else bytes_of(data)])
        with self._putting:
            return sum([self._offer_one(slot, data) for slot in list(self._slots.values())])

    def put_many(self, entries: Iterable[Buffer]) -> int:
        """Offer entries to every client, in order, as many as fit into its queue. Never waits.

        Returns
        -------
        int
            Clients whose queue took all of them.

        Raises
        ------
        RangeError, InvalidArgument, ClosedError
            As `put`; none of them was offered.
        """
        views = [bytes_of(entry) for entry in entries]
        self._check(views)
        with self._putting:
            return sum([self._offer(slot, views) for slot in list(self._slots.values())])

    def _check(self, entries: list[memoryview]) -> None:
        self._check_open()
        for entry in entries:
            if entry.nbytes > self.largest:
                raise RangeError(
                    f"an entry of {entry.nbytes:,} bytes does not go into queue {self.name!r}, "
                    f"whose largest has {self.largest:,}: give it a larger capacity, or share a "
                    "descriptor",
                    errno=errno.EMSGSIZE,
                )

    def _offer_one(self, slot: Slot[Producer], data: Buffer) -> bool:
        try:
            if slot.end.try_enqueue(data):
                return True
        except (PeerGoneError, ClosedError, ProtocolError) as error:
            self._failed(slot, error)
            return False
        slot.dropped += 1
        return False

    def _offer(self, slot: Slot[Producer], entries: list[memoryview]) -> bool:
        try:
            done = slot.end._put_many(entries, 0)
        except (PeerGoneError, ClosedError, ProtocolError) as error:
            self._failed(slot, error)
            return False
        slot.dropped += len(entries) - done
        return done == len(entries)

    def __getitem__(self, client: UserClient) -> Producer:
        """Give one client's producer, for who wants to wait for it.

        Raises
        ------
        ShareNotFoundError
            The client does not have the queue open (ENOENT); it is a KeyError.
        """
        slot = self._slots.get(client)
        if slot is None:
            raise ShareNotFoundError(
                f"{client!r} does not have queue {self.name!r} open", errno=errno.ENOENT
            )
        return slot.end

    def producers(self) -> dict[UserClient, Producer]:
        """Give every client's producer."""
        with self._changed:
            found = {client: slot.end for client, slot in self._slots.items()}
        return cast("dict[UserClient, Producer]", found)

    def statistics(self) -> dict[UserClient, PutStatistics]:
        """Tell what went to each client that has it open."""
        with self._changed:
            slots = list(self._slots.values())
        told: dict[Accepted, PutStatistics] = {}
        for slot in slots:
            done = slot.end.statistics()
            told[slot.client] = PutStatistics(done.entries, done.nbytes, slot.dropped)
        return cast("dict[UserClient, PutStatistics]", told)

    def _make_end(self, memory: BufferMemoryDescriptor) -> tuple[Producer, sockets.socket]:
        ours, theirs = notification_pair()
        try:
            with ours:
                return Producer(memory, notify=ours), theirs
        except BaseException:
            theirs.close()
            raise

    def forked(self) -> None:
        """In a fork child: the queues stay the parent's."""
        super().forked()
        self._putting = threading.RLock()
