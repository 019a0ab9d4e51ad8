"""Queues: what a connection has of those of its service."""

from __future__ import annotations

import errno
import socket as sockets
import weakref
from typing import TYPE_CHECKING

from memdesc.errors import (
    MemdescError,
    ProtocolError,
)
from memdesc.handover import discard, unpack
from memdesc.services import protocol
from memdesc.services.limits import Limits
from memdesc.services.link import Link
from memdesc.vm.task import Task
from memdesc.vm.timeouts import SPIN

if TYPE_CHECKING:
    from memdesc.queues import Consumer, Producer


class QueuedTo(Link):
    """What a connection has of them."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(name, sock, task, limits, allow_copy=allow_copy)
        self._ends: weakref.WeakSet[Producer | Consumer] = weakref.WeakSet()

    def queue(
        self, name: str, *, spin: float = SPIN, timeout: float | None = 5.0
    ) -> Consumer | Producer:
        """Open this client's own queue of that name, waiting until the service has one.

        Parameters
        ----------
        name : str
            As the service gives it.
        spin : float
            As of `Consumer` and `Producer`.
        timeout : float, optional
            Seconds to wait for it and for the service's answer; None waits for ever, 0 asks once.

        Returns
        -------
        Consumer or Producer
            Whichever the service is not. Owned by the caller, and ended by `close`; then the queue
            can be opened anew. Keeps the connection. When that ends, its waits end at once with
            `PeerGoneError` (ECONNRESET), after what is in the queue.

        Raises
        ------
        ShareNotFoundError
            The service had none in that time, or not for this client (ENOENT).
        InvalidArgument
            This client has it open, or what it put in before waits to be taken (EBUSY): a queue
            has one end on each side.
        LimitError
            It would go beyond what the service lets a client have (EDQUOT).
        AllocationError
            The service, or this process, has no memory or descriptor left for it.
        TimedOutError, PeerGoneError, ClosedError
        """
        answer, fds = self._ask_about(protocol.OpenQueue, name, protocol.QueueOpened, timeout)
        return self._queue_opened(name, answer, fds, spin)

    async def queue_async(
        self, name: str, *, spin: float = SPIN, timeout: float | None = 5.0
    ) -> Consumer | Producer:
        """As `queue`, for asyncio. Cancelled, the queue that came is ended."""
        answer, fds = await self._ask_about_async(
            protocol.OpenQueue, name, protocol.QueueOpened, timeout
        )
        return self._queue_opened(name, answer, fds, spin)

    def _queue_opened(
        self, name: str, answer: protocol.QueueOpened, fds: list[int], spin: float
    ) -> Consumer | Producer:
        """Make the client's end of what came."""
        from memdesc.queues import Consumer, Producer  # here: who only maps needs none

        if not fds:
            raise ProtocolError(f"queue {name!r} came without its socket", errno=errno.EPROTO)
        user = self.task.credentials.uid
        socket = socket_of(fds.pop(), fds, user)
        with socket:
            memory = unpack(answer.portable, fds, user=user)
            memory.name = name
            try:
                end: Consumer | Producer
                if answer.produces:
                    end = Producer(memory, notify=socket, spin=spin)
                else:
                    end = Consumer(memory, listen=socket, spin=spin)
            except BaseException:
                memory.close()
                raise
        end._keeps = self
        with self._lock:
            self._ends.add(end)
            gone = self._gone is not None
        if gone:
            _tell(end)
        return end

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            ends = list(self._ends)
        for end in ends:
            _tell(end)


def socket_of(fd: int, others: list[int], user: int) -> sockets.socket:
    """Take a descriptor over that is to be a queue's socket; what is none is closed with all."""
    try:
        socket = sockets.socket(fileno=fd)
    except OSError as error:
        discard([fd, *others], user)
        raise ProtocolError(f"the queue's socket is none: {error}", errno=errno.EPROTO) from error
    if (socket.family, socket.type) != (sockets.AF_UNIX, sockets.SOCK_STREAM):
        discard([socket.detach(), *others], user)
        raise ProtocolError("the queue's socket is of another kind", errno=errno.EPROTO)
    return socket


def _tell(end: Producer | Consumer) -> None:
    """Tell an end that the other side has gone; that it had closed its end stays what is said."""
    try:
        closed_before = end._look()[2]
    except MemdescError:  # closed here, or corrupt: its calls say so
        closed_before = True
    if closed_before:
        end._set_gone()
    else:
        end.peer_gone()
