"""Describing: what a service tells of itself to those who look after it, and how they ask.

Only its own user and root are told: who may stop the process anyway. Who asks is no client, and
does not become one: nobody waits for it, no rule is called, and nothing is opened or granted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket as sockets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import (
    AccessDeniedError,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    ServiceNotFoundError,
    TimedOutError,
    describe_errno,
)
from memdesc.handover import discard, receive_once
from memdesc.services import protocol
from memdesc.services.failures import rebuilt
from memdesc.services.folder import new_socket
from memdesc.services.protocol.describing import MAX_ITEMS, MAX_TOLD_OBJECTS, Item
from memdesc.services.queues.books import Slot
from memdesc.services.queues.producers import ClientProducers
from memdesc.services.statistics import statistics_of
from memdesc.vm.task import Task, peer_credentials

if TYPE_CHECKING:
    from pathlib import Path

    from memdesc.services.service import Service
    from memdesc.services.sharing import _Shared

MOST_ITEMS = 1 << 17
"""Items that are read of one service: it could go on until this process has no memory left."""
_AT_HAND = (BufferMemoryDescriptor, ReceivedMemoryDescriptor, SnapshotMemoryDescriptor)


# -- the service's side, on the I/O thread ---------------------------------------------------------


def describe(service: Service, asks: Task, question: protocol.Describe) -> protocol.Described:
    """Answer who looks after the service.

    Raises
    ------
    AccessDeniedError
        It is neither of the same user nor root (EACCES).
    """
    if asks.credentials.uid not in (0, os.geteuid()):
        raise AccessDeniedError(
            f"service {service.name!r} tells of itself to user {os.geteuid()} and root alone, not "
            f"to user {asks.credentials.uid}",
            errno=errno.EACCES,
        )
    told = statistics_of(service)
    items: list[Item] = []
    more = False
    if question.start is not None:
        items, more = _page(_items(service, question.start))
    return protocol.Described(
        id=question.id,
        service=service.name,
        superseded=told.superseded,
        clients=told.clients,
        shares=told.shares,
        queues=told.queues,
        streams=told.streams,
        methods=told.methods,
        calls=told.calls,
        entries=told.entries,
        entry_bytes=told.entry_bytes,
        slots=told.slots,
        slot_bytes=told.slot_bytes,
        items=tuple(items),
        more=more,
    )


def _page(items: Iterator[Item]) -> tuple[list[Item], bool]:
    """Give as many items as one message carries, and whether there are more."""
    page: list[Item] = []
    room = protocol.MAX_MESSAGE - 8192
    for item in items:
        room -= len(protocol.encode(item))
        if len(page) == MAX_ITEMS or room < 0:
            return page, True
        page.append(item)
    return page, False


def _items(service: Service, start: int) -> Iterator[Item]:
    """Give the items from a number on; shares before it, which can be many, take no time."""
    with service._lock:
        shares = list(service._shares.values())
    yield from map(_share_item, itertools.islice(shares, start, None))
    yield from itertools.islice(_others(service), max(start - len(shares), 0), None)


def _share_item(shared: _Shared) -> Item:
    return protocol.ShareItem(
        shared.name,
        shared.descriptor.length,
        shared.access.writable,
        shared.enforced,
        shared.allow is not None,
        shared.shape,
        shared.dtype,
        _objects(shared.descriptor),
        shared.content,
    )


def _others(service: Service) -> Iterator[Item]:
    for name, stream in service.streams().items():
        form, done = stream.form, stream.statistics()
        yield protocol.StreamItem(
            name,
            form.slots,
            form.nbytes,
            done.published,
            done.nbytes,
            form.shape,
            form.dtype,
            _objects(stream.memory),
        )
        pids = {one.number: one for one in stream.subscribers()}
        for seat in done.subscribers:
            known = pids.get(seat.number)
            yield protocol.SubscriberItem(
                name,
                None if known is None or known.peer is None else known.peer.pid,
                seat.policy.value,
                seat.offers,
                seat.dropped,
                seat.held,
                () if known is None else _objects(known.memory),
            )
    yield from _queue_items(service)
    for client in service.clients():
        yield protocol.ClientItem(
            client.task.pid,
            client.task.credentials.uid,
            len(client._calls),
            len(client._in_peer),
        )


def _queue_items(service: Service) -> Iterator[Item]:
    for name, queue in service.queues().items():
        produces = isinstance(queue, ClientProducers)
        yield protocol.QueueItem(name, queue.nbytes, produces, queue.wired)
        with queue._changed:
            slots: list[Slot[Any]] = list(queue._slots.values())
        for slot in slots:
            done = slot.end.statistics()
            yield protocol.QueueEndItem(
                name,
                slot.client.task.pid,
                done.entries,
                done.nbytes,
                slot.dropped,
                _objects(slot.memory),
            )


def _objects(descriptor: MemoryDescriptor) -> tuple[tuple[int, int], ...]:
    """Tell what memory lies in, as far as that is at hand: to look for others' would take time."""
    found: dict[tuple[int, int], None] = {}
    parts = [descriptor]
    for part in parts:  # grows while it is gone through
        if isinstance(part, MultiMemoryDescriptor):
            parts += part.members[:MAX_TOLD_OBJECTS]
        elif isinstance(part, SubMemoryDescriptor):
            parts.append(part.parent)
        elif isinstance(part, _AT_HAND):
            with contextlib.suppress(MemdescError):  # it was closed meanwhile
                for extent in part._extents(0, part.length, part.max_access):
                    found[extent.object.identity] = None
        if len(found) >= MAX_TOLD_OBJECTS or len(parts) > 4 * MAX_TOLD_OBJECTS:
            break
    return tuple(found)[:MAX_TOLD_OBJECTS]


# -- the side of who asks --------------------------------------------------------------------------


class Inquiry:
    """Asks one service what it does, again and again; never waits longer than it was told.

    The service may be anything that has made a socket there: what it says is checked for its
    form, and is a claim. Who it is, `task`, is the kernel's word.

    Parameters
    ----------
    path : Path
        Of the service's socket.

    Attributes
    ----------
    task : Task or None
        Who listens; None where this process can not see it (another pid namespace).

    Raises
    ------
    ServiceNotFoundError
        Nobody listens (ECONNREFUSED), or there is no such socket (ENOENT).
    AccessDeniedError
        The socket is not for this user (EACCES).
    ProtocolError
        It is another kind of socket (EPROTOTYPE).
    TimedOutError
        Its queue of those who wait is full (EAGAIN).

    Notes
    -----
    Threads: not safe. Linux: a Unix seqpacket socket, SO_PEERCRED, SO_PEERPIDFD.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.task: Task | None = None
        self._number = 0
        self._sock = new_socket()
        try:
            self._sock.connect(os.fspath(path))
            with contextlib.suppress(MemdescError):
                self.task = Task.from_socket(self._sock)
        except BaseException as error:
            self._sock.close()
            if isinstance(error, OSError):
                raise _explained(path, error) from error
            raise

    def ask(self, start: int | None = None) -> None:
        """Send the question; `start` as of `Describe`."""
        self._number += 1
        question = protocol.encode(protocol.Describe(self._number, start))
        try:
            self._sock.send(question, sockets.MSG_NOSIGNAL)
        except BlockingIOError as error:
            raise silent(self.path) from error
        except OSError as error:
            raise self._gone() from error

    def answer(self, until: float) -> protocol.Described:
        """Give the answer to what was asked last, by that time (`time.monotonic`).

        Raises
        ------
        TimedOutError
            It has not answered (ETIMEDOUT).
        PeerGoneError
            It ended the connection: older versions do.
        ProtocolError
            It said what is no answer.
        AccessDeniedError
            It does not tell this user.
        """
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        # What was in flight when an earlier wait ended comes first, and is passed over.
        for _ in range(MAX_ITEMS):
            if not poller.poll(max(until - time.monotonic(), 0) * 1000):
                raise silent(self.path)
            message = self._receive()
            if isinstance(message, protocol.Failed) and message.id in (0, self._number):
                raise rebuilt(message)
            if not isinstance(message, protocol.Described) or message.id > self._number:
                raise ProtocolError(
                    f"{self.path} answered {type(message).__name__}", errno=errno.EPROTO
                )
            if message.id == self._number:
                return message
        raise silent(self.path)

    def ask_on(self, answer: protocol.Described, items: list[Item]) -> bool:
        """Put what an answer tells to the items before it, and ask for more, if there are any.

        Raises
        ------
        ProtocolError
            It tells of more things than it can have.
        TimedOutError, PeerGoneError
            As `ask`.
        """
        items += answer.items
        if not answer.more or not answer.items:
            return False
        if len(items) > MOST_ITEMS:
            raise ProtocolError(
                f"{self.path} tells of more than {MOST_ITEMS:,} things, without end",
                errno=errno.EPROTO,
            )
        self.ask(len(items))
        return True

    def fileno(self) -> int:
        """Give the socket's descriptor, to wait for."""
        return self._sock.fileno()

    def _receive(self) -> object:
        try:
            data, fds, _ = receive_once(self._sock, protocol.MAX_MESSAGE)
        except MemdescError:
            raise
        except OSError as error:
            raise self._gone() from error
        discard(fds, peer_credentials(self._sock)[1])
        if not data:
            raise self._gone()
        return protocol.read(data)

    def _gone(self) -> PeerGoneError:
        return PeerGoneError(
            f"{self.path} ended the connection without a word (an older version?)",
            errno=errno.ECONNRESET,
        )

    def close(self) -> None:
        """Hang up. Again is a no-op."""
        self._sock.close()
        if self.task is not None:
            self.task.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def silent(path: Path) -> TimedOutError:
    """Make the error that says that a service does not answer."""
    return TimedOutError(f"{path} does not answer (stopped, or busy?)", errno=errno.ETIMEDOUT)


def _explained(path: Path, error: OSError) -> MemdescError:
    if isinstance(error, MemdescError):
        return error
    if error.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR):
        return ServiceNotFoundError(f"no one listens at {path}", errno=error.errno)
    if error.errno == errno.EAGAIN:
        return TimedOutError(
            f"{path} takes no connection: its queue of those who wait is full (stopped?)",
            errno=error.errno,
        )
    if error.errno == errno.EPROTOTYPE:
        return ProtocolError(f"{path} is another program's socket", errno=error.errno)
    return AccessDeniedError(
        f"user {os.geteuid()} can not use {path}: {describe_errno(error)}", errno=error.errno
    )
