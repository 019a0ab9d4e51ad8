"""Streams: what a connection has of those of its service."""

from __future__ import annotations

import errno
import socket as sockets
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from memdesc.errors import (
    InvalidArgument,
    MemdescError,
    ProtocolError,
)
from memdesc.handover import discard, unpack
from memdesc.services import protocol
from memdesc.services.limits import Limits
from memdesc.services.link import Link
from memdesc.services.opening import socket_of
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.streams import Backpressure, Subscription


class Subscribing(Link):
    """What a connection has of them."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(name, sock, task, limits, allow_copy=allow_copy)
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()

    def subscribe(
        self,
        name: str,
        *,
        policy: Backpressure | str = "drop_oldest",
        depth: int = 4,
        loans: int = 2,
        latest: bool = True,
        timeout: float | None = 5.0,
    ) -> Subscription:
        """Subscribe to a stream of the service, waiting until it has one of that name.

        Parameters
        ----------
        name : str
            As the service gives it.
        policy : Backpressure, or its value
            What happens when this client is too slow; the publisher says which are allowed.
        depth : int
            Slots that are offered to it at a time.
        loans : int
            Slots that it may hold at a time: the one at hand, and those kept.
        latest : bool
            Be offered at once what was published last, if anything was.
        timeout : float, optional
            Seconds to wait for the stream and for the service's answer; None waits for ever, 0 asks
            once.

        Returns
        -------
        Subscription
            Owned by the caller, and ended by `close`. When the connection ends, its waits end at
            once with `PeerGoneError` (ECONNRESET), after what was offered.

        Raises
        ------
        ShareNotFoundError
            The service had none in that time, or not for this client (ENOENT).
        LimitError
            It would keep more slots than the service lets a client have (EDQUOT).
        AllocationError
            The stream has no slots left for one more (EDQUOT).
        InvalidArgument
            The stream does not allow that policy, or the numbers make no sense.
        TimedOutError, PeerGoneError, ClosedError
        """
        question = _question(policy, depth, loans, latest)
        answer, fds = self._ask_about(question, name, protocol.Subscribed, timeout)
        return self._subscribed(name, answer, fds, depth, loans)

    async def subscribe_async(
        self,
        name: str,
        *,
        policy: Backpressure | str = "drop_oldest",
        depth: int = 4,
        loans: int = 2,
        latest: bool = True,
        timeout: float | None = 5.0,
    ) -> Subscription:
        """As `subscribe`, for asyncio. Cancelled, the subscription that came is ended."""
        question = _question(policy, depth, loans, latest)
        answer, fds = await self._ask_about_async(question, name, protocol.Subscribed, timeout)
        return self._subscribed(name, answer, fds, depth, loans)

    def _subscribed(
        self, name: str, answer: protocol.Subscribed, fds: list[int], depth: int, loans: int
    ) -> Subscription:
        """Make the client's end of what came."""
        subscription = self._checked_end(name, answer, fds, depth, loans)
        with self._lock:
            self._subscriptions.add(subscription)
            gone = self._gone is not None
        if gone:
            subscription.peer_gone()
        return subscription

    def _checked_end(
        self, name: str, answer: protocol.Subscribed, fds: list[int], depth: int, loans: int
    ) -> Subscription:
        """Make it, checking all of it."""
        from memdesc.streams import StreamForm, Subscription

        user = self.task.credentials.uid
        if len(fds) != 3:
            discard(fds, user)
            raise ProtocolError(
                f"stream {name!r} came with {len(fds)} descriptors, not 3", errno=errno.EPROTO
            )
        with socket_of(fds.pop(), fds, user) as socket:
            second = fds.pop()
            try:
                pool = unpack(answer.pool, fds, user=user)
            except BaseException:
                discard([second], user)
                raise
            with pool, unpack(answer.line, [second], user=user) as line:
                pool.name = line.name = name
                try:
                    form = StreamForm(answer.slots, answer.nbytes, answer.shape, answer.dtype)
                except InvalidArgument as error:
                    raise ProtocolError(
                        f"stream {name!r} is of no sense: {error}", errno=errno.EPROTO
                    ) from error
                return Subscription(
                    pool, line, form, depth, loans, listen=socket, peer=self.task, name=name
                )

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            subscription.peer_gone()


def _question(
    policy: Backpressure | str, depth: int, loans: int, latest: bool
) -> Callable[[int, str], protocol.Subscribe]:
    """Give what makes the question of its id and the name."""
    from memdesc.streams import Backpressure  # here: who only maps needs none

    chosen = Backpressure(policy).value
    return lambda number, name: protocol.Subscribe(number, name, chosen, depth, loans, latest)
