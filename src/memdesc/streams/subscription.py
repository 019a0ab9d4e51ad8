"""Subscription: a stream as one subscriber sees it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Self

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.errors import (
    AllocationError,
    ClosedError,
    InvalidArgument,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
)
from memdesc.mapping import LocalMemoryMap
from memdesc.queues.notify import clear, own_socket
from memdesc.queues.waiting import GLANCE, time_left, timed_out
from memdesc.streams.ends import (
    INHERITED,
    decode,
    given_back,
    register,
    window_of,
)
from memdesc.streams.layout import HEADER, StreamForm
from memdesc.vm import tracing
from memdesc.vm.awaiting import Sleepers, readable, until
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access
from memdesc.vm.task import Task
from memdesc.vm.timeouts import SPIN, deadline_of

if TYPE_CHECKING:
    import socket as sockets

_ENDED, _SLOW, _BROKEN = 1, 2, 3


@dataclass(frozen=True, slots=True)
class SubscriptionStatistics:
    """What a subscription did since it was made.

    Attributes
    ----------
    taken, missed : int
        Slots that were taken; those published meanwhile that were not to be had any more.
    nbytes : int
        Of those taken.
    held : int
        Taken, and not given back: handles, and views of slots whose handle has gone.
    waits, sleeps : int
        Calls that found nothing and waited; how often one slept.
    notifications : int
        How often the publisher was woken, who waited for this subscriber.
    """

    taken: int
    missed: int
    nbytes: int
    held: int
    waits: int
    sleeps: int
    notifications: int


class Subscription(_core.StreamSubscriber):
    """A stream as a subscriber sees it: read-only slots, one after the other.

    Iterating (``for``, ``async for``) gives slot after slot until the publisher closes the stream;
    each goes back at the next turn, unless `TakenSlot.keep` was called.

    Parameters
    ----------
    pool, line : MemoryDescriptor
        The stream's `memory`, and the `memory` of what `Stream.admit` gave, as they arrived here.
    form : StreamForm
    depth, loans : int
        As agreed with the publisher.
    listen : socket, optional
        The subscriber's of `notification_pair`; duplicated. Needed by `fileno` and ``async``.
    peer : Task, optional
        The publisher's: a wait then notices within 0.25 s that it has ended.
    name : str
        Of the stream, for messages.

    Raises
    ------
    ProtocolError
        The memory is no stream's of that form (EPROTO).
    MappingError, InvalidArgument

    Notes
    -----
    Nothing that the publisher writes makes this side read outside of the slots. Threads: safe;
    several may take, each gets slots of its own. Fork: it stays the parent's; in the child it is
    closed, and slots that were held are to be read only as long as the parent holds them.
    """

    def __init__(
        self,
        pool: MemoryDescriptor,
        line: MemoryDescriptor,
        form: StreamForm,
        depth: int,
        loans: int,
        *,
        listen: sockets.socket | None = None,
        peer: Task | None = None,
        name: str = "stream",
    ) -> None:
        check_descriptor(pool, "pool")
        check_descriptor(line, "line")
        self.name, self.form, self.loans = name, form, loans
        self._peer, self._waits = peer, 0
        self._lock = lock_for(self)
        self._sleepers = Sleepers()
        self._pool: _core.Window | None = None
        pool_window = window_of(pool, Access.READ_ONLY, form.pool_bytes)
        line_window = window_of(line, Access.READ_WRITE, form.line_bytes(depth))
        self._socket = own_socket(listen)
        if not self._begin(
            pool_window,
            line_window,
            HEADER,
            form.slots,
            form.stride,
            form.nbytes,
            depth,
            loans,
            form.array_maker(),
            decode,
            given_back,
            None if self._socket is None else self._socket.close,
        ):
            if self._socket is not None:
                self._socket.close()
            raise ProtocolError(
                f"{line.name!r} is no subscriber's memory of a stream: make it with Stream.admit()",
                errno=errno.EPROTO,
            )
        self._pool = pool_window
        register(self)

    # -- taking ----------------------------------------------------------------------------------

    def take_nowait(self) -> _core.TakenSlot:
        """Take the next slot, or raise `TimedOutError` (EAGAIN) where none is there."""
        return self.take(0)

    def latest(self, timeout: float | None = None) -> _core.TakenSlot:
        """Take the newest slot that is offered now, and give those before it back unseen.

        Waits as `take` does where none is there, and raises what it raises.
        """
        slot = self.take(timeout)
        for _ in range(self._pending()):
            if self._counts()[3] >= self.loans:
                slot.release()
                slot = self.take(timeout)
                continue
            newer = self.try_take()
            if newer is None:
                break
            slot.release()
            slot = newer
        return slot

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a slot is offered; False where the time ran out.

        Raises
        ------
        PeerGoneError, ProtocolError, ClosedError
        """
        return self._wait(deadline_of(timeout))

    @property
    def pending(self) -> int:
        """How many slots are offered now."""
        return self._pending()

    @property
    def missed(self) -> int:
        """How many slots were published between those taken, and not to be had any more."""
        return self._counts()[1]

    def _take(self, timeout: float | None) -> _core.TakenSlot:
        deadline = deadline_of(timeout)
        while self._wait(deadline):
            slot = self.try_take()
            if slot is not None:
                return slot
        raise self._nothing(timeout)

    def _nothing(self, timeout: float | None) -> TimedOutError:
        return timed_out(timeout, f"stream {self.name!r}: nothing was published")

    def _wait(self, deadline: float | None) -> bool:
        """Wait until something is offered; raise where nothing will be any more."""
        # Who waits already is waited for: a line has one wish at a time.
        if not self._lock.acquire(timeout=time_left(deadline)):
            return False
        try:
            self._waits += 1
            spin = int(SPIN * 1e9)
            while not self._ready():
                left = time_left(deadline)
                if not left:
                    return False
                if not self._sleep(spin, int(min(left, GLANCE) * 1e9)):
                    spin = 0
                    if self._peer is not None and not self._peer.alive:
                        self.peer_gone()
            return True
        finally:
            self._lock.release()

    # -- event loops -----------------------------------------------------------------------------

    def fileno(self) -> int:
        """Give the socket that an event loop waits on; for `select` and `loop.add_reader`.

        It becomes readable when something is offered where nothing was, and stays so until a call
        finds nothing. So look (`try_take`) once before the first wait. It is readable too when the
        publisher ends.

        Raises
        ------
        InvalidArgument
            The subscription was made without `listen`.
        ClosedError
        """
        self._pending()  # open, or an error
        if self._socket is None:
            raise InvalidArgument(
                f"the subscription of {self.name!r} has no socket: make it with listen=",
                errno=errno.EINVAL,
            )
        self._listen()
        return self._socket.fileno()

    async def take_async(self, timeout: float | None = None) -> _core.TakenSlot:
        """As `take`, for asyncio; cancelling it loses nothing."""
        self.fileno()  # from here on a waking is asked for where nothing is found
        return await until(self.try_take, self._awaited, timeout, lambda: self._nothing(timeout))

    async def __aiter__(self) -> AsyncIterator[_core.TakenSlot]:
        while True:
            try:
                slot = await self.take_async()
            except PeerGoneError as error:
                if self._is_end(error):
                    return
                raise
            try:
                yield slot
            finally:
                slot._next_turn()

    async def _awaited(self) -> None:
        await readable(self.fileno, self._sleepers)

    def _wake(self) -> None:
        """Have all who await look again. On any thread."""
        if self._sleepers:
            self._sleepers.wake()

    def _clear(self) -> None:
        if self._socket is not None and not clear(self._socket):
            self.peer_gone()

    # -- devices ---------------------------------------------------------------------------------

    @property
    def memory(self) -> LocalMemoryMap:
        """The pool of slots, as this task sees it: every slot's address lies in it.

        For a device, which is to have all slots at once: what they show may change at any time,
        but for those that are held.

        Raises
        ------
        ClosedError
        """
        self._pending()  # open, or an error
        pool = self._pool
        if pool is None:
            self._closed()
        return LocalMemoryMap(pool, offset=0, access=Access.READ_ONLY, owner=None)

    # -- lifetime --------------------------------------------------------------------------------

    def peer_gone(self) -> None:
        """Say that the publisher's task has ended, as whoever knows it saw: a socket, a pidfd.

        What was offered can still be taken; then calls raise `PeerGoneError` (ECONNRESET).
        """
        self._set_gone()
        self._wake()

    def statistics(self) -> SubscriptionStatistics:
        """Tell what this subscription did."""
        taken, missed, nbytes, held, rung, sleeps, _ = self._counts()
        return SubscriptionStatistics(taken, missed, nbytes, held, self._waits, sleeps, rung)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._state() != 1

    def close(self) -> None:
        """Be done: nothing is offered any more. Again is a no-op.

        Slots that are held stay so until they are given back. Waits of other threads finish with
        `ClosedError`.
        """
        self._close()
        self._pool = None
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self._counts()[0]:,} taken"
        return f"<Subscription of {self.name!r}: {state}>"

    def _inherit(self) -> None:
        """In a fork child: the socket is the parent's."""
        if self._socket is not None:
            self._socket.close()

    @staticmethod
    def _is_end(error: Exception) -> bool:
        """Whether it says that the publisher closed the stream: then iterating is over."""
        return isinstance(error, PeerGoneError) and error.errno == errno.EPIPE

    def _closed(self) -> NoReturn:
        if self._state() == INHERITED:
            raise ClosedError(
                f"this subscription of {self.name!r} belongs to the parent of this forked process: "
                "subscribe here"
            )
        raise ClosedError(f"this subscription of {self.name!r} was closed")

    def _ended(self, why: int) -> NoReturn:
        if why == _BROKEN:
            raise ProtocolError(
                f"the publisher of {self.name!r} dropped this subscription: its memory was written "
                "to by something else, or more slots were held than agreed",
                errno=errno.EPROTO,
            )
        if why == _SLOW:
            raise PeerGoneError(
                f"the publisher of {self.name!r} dropped this subscription: it was too slow, which "
                "its policy (DISCONNECT) does not forgive",
                errno=errno.ECONNABORTED,
            )
        if why == _ENDED:
            raise PeerGoneError(f"stream {self.name!r} was closed", errno=errno.EPIPE)
        raise PeerGoneError(
            f"the publisher of {self.name!r} has ended: connect again; or it has dropped this "
            "subscription: subscribe again",
            errno=errno.ECONNRESET,
        )

    def _broke(self) -> NoReturn:
        raise ProtocolError(
            f"the publisher of {self.name!r} wrote what can not be: nothing more can be had from "
            "it; subscribe again",
            errno=errno.EPROTO,
        )

    def _too_many_loans(self) -> NoReturn:
        raise tracing.blamed(
            AllocationError(
                f"this subscription of {self.name!r} holds {self.loans} slot(s), as many as it "
                "may, arrays and memoryviews of earlier ones included: drop some, or subscribe "
                "with loans=",
                errno=errno.ENOBUFS,
            ),
            views_of=self._pool,
            of=("TakenSlot",),
        )
