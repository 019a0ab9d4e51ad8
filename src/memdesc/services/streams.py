"""Streams: what a service, its user clients and a connection have of them."""

from __future__ import annotations

import errno
import socket as sockets
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from memdesc.errors import (
    InvalidArgument,
    LimitError,
    MemdescError,
    PeerGoneError,
)
from memdesc.handover import close_all, pack
from memdesc.memory.memfd import fitting_name
from memdesc.memory.page_kinds import PageKind
from memdesc.queues import notification_pair
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.services.limits import Limits
from memdesc.services.offers import Allow, Offers, allows, not_offered
from memdesc.streams import Backpressure, Stream, Subscriber
from memdesc.streams.subscriber import BROKE, HARMLESS
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy.typing as npt

    from memdesc.services.service import Service


class Streaming(Accepting):
    """What a service has of them."""

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self._streams: dict[str, tuple[Stream, Allow | None]] = {}
        super().__init__(name, allow, limits)

    def stream(
        self,
        name: str,
        *,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        nbytes: int | None = None,
        slots: int = 8,
        loans: int = 1,
        policies: Collection[Backpressure | str] = HARMLESS,
        wired: bool = False,
        pages: PageKind = PageKind.AUTO,
        allow: Allow | None = None,
    ) -> Stream:
        """Have a stream that clients can subscribe to by that name.

        Parameters
        ----------
        name : str
            At most 1,024 characters. Streams have names of their own, beside those of shares.
        shape, dtype, nbytes, slots, loans, policies, wired, pages
            As of `Stream`.
        allow : callable, optional
            Further rule for this stream: takes the client's Task.

        Returns
        -------
        Stream
            Ends by `close`, its ``with`` block, or with the service.

        Raises
        ------
        InvalidArgument
            The service has a stream of that name (EEXIST), or the form makes no sense.
        AllocationError, WiringError, ClosedError

        Examples
        --------
        >>> import memdesc as md
        >>> with md.Service("camera") as camera, md.connect("camera") as connection:
        ...     stream = camera.stream("video", shape=(2, 3), dtype="u1")
        ...     video = connection.subscribe("video")
        ...     with stream.loan() as slot:
        ...         slot.array[:] = 7
        ...     with video.take(timeout=5.0) as slot:
        ...         int(slot.array.sum())
        42
        """
        protocol.check_name(name, "a stream")
        self._check_new(name)
        # Not with the lock, for which the I/O thread would wait: this can take a second.
        stream = Stream(
            shape=shape,
            dtype=dtype,
            nbytes=nbytes,
            slots=slots,
            loans=loans,
            policies=policies,
            wired=wired,
            pages=pages,
            name=fitting_name(name),
        )
        stream.name = name
        try:
            with self._lock:
                self._check_new(name)
                self._streams[name] = stream, allow
        except BaseException:
            stream.close()
            raise
        return stream

    def _check_new(self, name: str) -> None:
        with self._lock:
            self._check_open()
            known = self._streams.get(name)
        if known is not None and not known[0].closed:
            raise InvalidArgument(
                f"service {self.name!r} has a stream {name!r}: close it first, or give another "
                "name",
                errno=errno.EEXIST,
            )

    def streams(self) -> dict[str, Stream]:
        """Give the streams by their names."""
        with self._lock:
            return {
                name: stream for name, (stream, _) in self._streams.items() if not stream.closed
            }

    def _stream_for(self, client: StreamingClient, name: str) -> Stream:
        with self._lock:
            stream, rule = self._streams.get(name, (None, None))
        if stream is None or stream.closed or not allows(rule, client, name):
            raise not_offered(self, client, "subscribe", name, "stream")
        return stream

    def _offers(self) -> Offers:
        def rule_of(known: tuple[Stream, Allow | None]) -> Allow | None:
            return _nobody if known[0].closed else known[1]

        return super()._offers() | {"subscribe": (self._streams, rule_of)}

    def close(self) -> None:
        """End the service: give up the name and end every connection. Again is a no-op."""
        self._close_streams()  # before the connections: clients see that they were closed
        super().close()

    def _ending(self) -> None:
        super()._ending()
        self._close_streams()

    def _close_streams(self) -> None:
        for stream in self.streams().values():
            stream.close()

    def forked(self) -> None:
        """In a fork child: the streams stay the parent's."""
        super().forked()
        self._streams.clear()


def _nobody(_: Task) -> bool:
    """Who may have a stream that was closed."""
    return False


class StreamingClient(Accepted):
    """What a service's user client has of them."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(service, sock, task)
        self._subscribers: list[tuple[Stream, Subscriber, _Lease]] = []

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        service = self._service
        if isinstance(message, protocol.Subscribe) and service is not None:
            self._answer(message.id, lambda: self._subscribe(service, message))
        else:
            super()._handle(message, fds, lost)

    def _subscribe(
        self, service: Streaming, request: protocol.Subscribe
    ) -> tuple[protocol.Subscribed, list[int]]:
        stream = service._stream_for(self, request.name)
        self._check_loans(request)
        try:
            policy = Backpressure(request.policy)
        except ValueError as error:
            raise InvalidArgument(
                f"{request.policy[:80]!r} is no policy of a stream", errno=errno.EINVAL
            ) from error
        ours, theirs = notification_pair()
        with theirs:
            lease = _Lease(self, ours, request.name)
            try:
                subscriber = stream.admit(
                    policy,
                    depth=request.depth,
                    loans=request.loans,
                    latest=request.latest,
                    notify=ours,
                    peer=self.task,
                    ended=lease.ended,
                )
            except BaseException:
                ours.close()
                raise
            lease.subscriber = subscriber
            try:
                answer, fds = self._answer_of(request.id, stream, subscriber)
                fds.append(theirs.detach())
            except BaseException:
                subscriber.drop()
                raise
        self._subscribers.append((stream, subscriber, lease))
        return answer, fds

    def _answer_of(
        self, number: int, stream: Stream, subscriber: Subscriber
    ) -> tuple[protocol.Subscribed, list[int]]:
        user, form = self.task.credentials.uid, stream.form
        pool, fds = pack(stream.memory, None, enforced=True, user=user)
        try:
            line, more = pack(subscriber.memory, None, enforced=True, user=user)
        except BaseException:
            close_all(fds)
            raise
        return protocol.Subscribed(
            number, form.slots, form.nbytes, form.shape, form.dtype, pool, line
        ), fds + more

    def _check_loans(self, request: protocol.Subscribe) -> None:
        """Refuse what goes beyond what a client may keep of all streams together."""
        for stream, _, _ in self._subscribers:
            stream.look()
        self._subscribers = [known for known in self._subscribers if not known[1].gone]
        kept = request.loans + sum(subscriber.loans for _, subscriber, _ in self._subscribers)
        if kept > self.limits.loans:
            raise LimitError(
                f"task {self.task.pid} would hold {kept:,} slots of the service's streams, which "
                f"lets each client have {self.limits.loans:,}: close some subscriptions, or let it "
                "say limits=Limits(loans=…)",
                errno=errno.EDQUOT,
            )

    def forked(self) -> None:
        """In a fork child: the sockets are the parent's, else nobody would see it end."""
        super().forked()
        for _, _, lease in self._subscribers:
            lease.forked()
        self._subscribers.clear()

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        subscribers, self._subscribers = self._subscribers, []
        # What a client that ended the connection still looks at stays as it is, until it has no
        # more of it, or somebody else needs the room. One that was thrown out keeps nothing.
        left = isinstance(why, PeerGoneError) and why.errno == errno.ECONNRESET
        for _, subscriber, lease in subscribers:
            if left:
                subscriber.leave()
                lease.watch()
            else:
                subscriber.drop()


class _Lease:
    """The service's end of a subscription's socket: when the other end goes, all comes back."""

    def __init__(self, client: StreamingClient, socket: sockets.socket, name: str) -> None:
        self._loop, self._client, self._name = client._loop, weakref.ref(client), name
        self._socket: sockets.socket | None = socket
        self.subscriber: Subscriber | None = None
        socket.setblocking(False)

    def watch(self) -> None:
        """Have the subscriber dropped when the client's end is gone. On the I/O thread."""
        if self._socket is not None:
            self._loop.watch(self._socket.fileno(), self._ready)

    def _ready(self, _: int) -> None:
        """Drop it: it is gone, or sends what it must not."""
        self._close()
        # The loop holds on to what it called last: not to the subscriber too.
        subscriber, self.subscriber = self.subscriber, None
        if subscriber is not None:
            subscriber.drop()

    def ended(self, why: str) -> None:
        """Know that the stream has done with the subscriber. On any thread."""
        self.subscriber = None
        self._loop.post(self._close)
        client = self._client()
        if why == BROKE and client is not None:
            client._drop(f"of stream {self._name[:80]!r} it {why}")

    def forked(self) -> None:
        """In a fork child: without a word to the loop, which is the parent's."""
        if self._socket is not None:
            self._socket.close()

    def _close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            self._loop.forget(socket.fileno())
            socket.close()
