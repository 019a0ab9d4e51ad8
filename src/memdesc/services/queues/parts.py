"""Queues: what a service, its user clients and a connection have of them."""

from __future__ import annotations

import errno
import socket as sockets
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, overload

from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    LimitError,
    MemdescError,
    ProtocolError,
)
from memdesc.queues.layout import MAX_CAPACITY, memory_for
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.services.errands import Errands
from memdesc.services.failures import failed
from memdesc.services.limits import Limits
from memdesc.services.offers import Allow, Offers, allows, not_offered
from memdesc.services.queues.consumers import ClientConsumers
from memdesc.services.queues.producers import ClientProducers
from memdesc.vm.pages import Direction, check_length
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.services.service import Service

_Queues = ClientProducers | ClientConsumers
_OPENINGS = 64
"""Queues that one client may be opening at a time."""


class Queueing(Accepting):
    """What a service has of them."""

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self._queues: dict[str, _Queues] = {}
        self._errands = Errands()
        super().__init__(name, allow, limits)

    @overload
    def queue(
        self,
        name: str,
        *,
        capacity: int = ...,
        direction: Literal[Direction.OUT] = ...,
        wired: bool = ...,
        allow: Allow | None = ...,
    ) -> ClientProducers: ...

    @overload
    def queue(
        self,
        name: str,
        *,
        capacity: int = ...,
        direction: Literal[Direction.IN],
        wired: bool = ...,
        allow: Allow | None = ...,
    ) -> ClientConsumers: ...

    def queue(
        self,
        name: str,
        *,
        capacity: int = 1 << 20,
        direction: Direction = Direction.OUT,
        wired: bool = False,
        allow: Allow | None = None,
    ) -> _Queues:
        """Have a data queue for each client that opens it by that name.

        Parameters
        ----------
        name : str
            At most 1,024 characters. Queues have names of their own, beside those of shares.
        capacity : int
            Bytes of the data area of each client's queue, rounded up to pages.
        direction : Direction
            OUT: the service produces, the clients consume. IN: the other way round.
        wired : bool
            Keep the queues resident.
        allow : callable, optional
            Further rule for this queue: takes the client's Task.

        Returns
        -------
        ClientProducers or ClientConsumers
            Ends by `close`, its ``with`` block, or with the service.

        Raises
        ------
        InvalidArgument
            The service has a queue of that name (EEXIST); or no client could open one as large, by
            the service's own `Limits` (EDQUOT).
        AllocationError, ClosedError

        Notes
        -----
        The service makes each client's memory when it opens the queue, and counts it against
        `Limits.queue_bytes` and `Limits.wired_bytes`. I/O Kit: IODataQueue, and a user client's
        clientMemoryForType.

        Examples
        --------
        >>> import memdesc as md
        >>> with md.Service("thermometer") as service:
        ...     samples = service.queue("samples", capacity=4096)
        ...     with md.connect("thermometer") as connection:
        ...         consumer = connection.queue("samples")
        ...         taken_by = samples.put(b"21.5")
        ...         consumer.dequeue(timeout=5.0)
        b'21.5'
        """
        protocol.check_name(name, "a queue")
        if check_length(capacity, "capacity") > MAX_CAPACITY:
            raise InvalidArgument(
                f"capacity is {capacity:,}: a queue has at most {MAX_CAPACITY:,} bytes",
                errno=errno.EINVAL,
            )
        for limit in ("queue_bytes", "wired_bytes") if wired else ("queue_bytes",):
            most = getattr(self.limits, limit)
            if memory_for(capacity) > most:
                raise InvalidArgument(
                    f"queue {name!r} takes {memory_for(capacity):,} bytes for each client, which "
                    f"may have {most:,}: say limits=Limits({limit}=…) to the service",
                    errno=errno.EDQUOT,
                )
        kind: type[_Queues]
        kind = ClientProducers if Direction(direction) is Direction.OUT else ClientConsumers
        if direction is Direction.OUT_IN:
            raise InvalidArgument(
                f"queue {name!r} of direction OUT_IN: make one for each way", errno=errno.EINVAL
            )
        with self._lock:
            self._check_open()
            if name in self._queues:
                raise InvalidArgument(
                    f"service {self.name!r} has a queue {name!r}: close it first, or give another "
                    "name",
                    errno=errno.EEXIST,
                )
            made = kind(self, name, capacity, wired=wired, allow=allow)
            self._queues[name] = made
        return made

    def queues(self) -> dict[str, ClientProducers | ClientConsumers]:
        """Give the queues by their names."""
        with self._lock:
            return dict(self._queues)

    def _offers(self) -> Offers:
        return super()._offers() | {"queue": (self._queues, lambda queue: queue._allow)}

    def _forget_queue(self, queue: object) -> None:
        with self._lock:
            self._queues = {
                name: known for name, known in self._queues.items() if known is not queue
            }

    def close(self) -> None:
        """End the service: give up the name and end every connection. Again is a no-op."""
        self._close_queues()  # before the connections: clients see that they were closed
        super().close()

    def _ending(self) -> None:
        super()._ending()
        self._close_queues()
        self._errands.finish()

    def _close_queues(self) -> None:
        for queue in self.queues().values():
            queue.close()

    def forked(self) -> None:
        """In a fork child: the queues stay the parent's."""
        super().forked()
        self._errands = Errands()
        for queue in self._queues.values():
            queue.forked()
        self._queues.clear()


class QueueingClient(Accepted):
    """What a service's user client has of them."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(service, sock, task)
        self._openings: deque[int] = deque()  # questions that errands are to answer

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.OpenQueue):
            self._open_queue(message)
        else:
            super()._handle(message, fds, lost)

    def _open_queue(self, request: protocol.OpenQueue) -> None:
        service = self._service
        if service is None:
            return
        try:
            if len(self._openings) >= _OPENINGS:
                raise LimitError(
                    f"task {self.task.pid} is opening {_OPENINGS} queues already: let it wait for "
                    "the answers",
                    errno=errno.EDQUOT,
                )
            self._openings.append(request.id)
            try:
                service._errands.add(lambda: self._open_now(service, request))
            except BaseException:
                self._openings.pop()
                raise
        except (AllocationError, LimitError) as error:
            self._send_if_there(failed(request.id, error))

    def _open_now(self, service: Queueing, request: protocol.OpenQueue) -> None:
        """Make the queue and answer, on the thread of errands."""
        try:
            self._answer(request.id, lambda: self._make_queue(service, request))
        except ProtocolError:
            if self._gone is None:
                raise  # else that is what ended the connection meanwhile, and was told then
        finally:
            self._openings.popleft()

    def _make_queue(
        self, service: Queueing, request: protocol.OpenQueue
    ) -> tuple[protocol.QueueOpened, list[int]]:
        queues = service.queues()
        queue = queues.get(request.name)
        if queue is None or not allows(queue._allow, self, queue.name):
            raise not_offered(service, self, "queue", request.name, "queue")
        theirs = [known for known in queues.values() if known._sweep(self)]
        if queue in theirs:
            raise InvalidArgument(
                f"task {self.task.pid} has queue {request.name!r} open: it uses that end, or "
                "closes it first",
                errno=errno.EBUSY,
            )
        self._check_room("queue_bytes", queue, theirs)
        if queue.wired:
            self._check_room("wired_bytes", queue, [known for known in theirs if known.wired])
        return queue._open(self, request.id)

    def _check_room(self, limit: str, wanted: _Queues, theirs: list[_Queues]) -> None:
        nbytes = wanted.nbytes + sum(known.nbytes for known in theirs)
        most = getattr(self.limits, limit)
        if nbytes > most:
            raise LimitError(
                f"task {self.task.pid} would have queues of {nbytes:,} bytes of the service, which "
                f"lets each have {most:,}: close some, or let it say limits=Limits({limit}=…)",
                errno=errno.EDQUOT,
            )

    def _ended(self, why: MemdescError) -> None:
        service = self._service
        super()._ended(why)
        if service is not None:
            for queue in service.queues().values():
                queue._gone(self)
