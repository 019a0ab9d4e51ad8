"""Stream: slots of memory filled in place, and offered to any number of subscribers."""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn, Self

from memdesc import _core
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    AllocationError,
    ClosedError,
    InvalidArgument,
    RangeError,
    TimedOutError,
)
from memdesc.memory.page_kinds import PageKind
from memdesc.queues.waiting import GLANCE, time_left, timed_out
from memdesc.streams.ends import INHERITED, encode, register
from memdesc.streams.layout import HEADER, form_of
from memdesc.streams.subscriber import (
    CODES,
    FAULTS,
    HARMLESS,
    REASONS,
    Backpressure,
    StreamStatistics,
    Subscriber,
    statistics_of,
)
from memdesc.vm import tracing
from memdesc.vm.awaiting import in_thread, until
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import check_integer
from memdesc.vm.task import Task
from memdesc.vm.timeouts import SPIN, deadline_of

if TYPE_CHECKING:
    import socket as sockets

    import numpy.typing as npt
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

log = logging.getLogger("memdesc.streams")

_OPEN = 1


class Stream(_core.StreamPool):
    """Slots of memory: loaned, filled in place, and published to any number of subscribers.

    One publisher, which may have several threads. Each subscriber has read-only pages, and has a
    slot that it took until it gives that back; so a slot is filled again only when nobody has it.

    Parameters
    ----------
    shape : int or tuple of int, optional
    dtype : optional
        Slots are arrays of that form.
    nbytes : int, optional
        Or bytes, so many at most.
    slots : int
        For `loans`, the latest published one, and what subscribers keep: of each as many as it
        may hold; of DROP_NEWEST also what may be offered to it; of BLOCK and DISCONNECT what may be
        offered to one of them.
    loans : int
        Slots that may be loaned at a time.
    policies : collection of Backpressure
        What subscribers may choose. By default all but BLOCK, by which one of them could hold up
        all others.
    wired, pages
        Of the memory, as of `BufferMemoryDescriptor`.
    name : str
        Shows in every task's maps file.

    Attributes
    ----------
    name : str
    form : StreamForm
        What a subscriber must know of the memory.
    memory : BufferMemoryDescriptor
        The pool of slots; granted read-only.
    policies : frozenset of Backpressure

    Raises
    ------
    InvalidArgument, AllocationError, WiringError, PageKindError

    Notes
    -----
    Threads: safe. Fork: the stream stays the parent's; in the child it is closed. Linux: memfd
    with F_SEAL_FUTURE_WRITE, futex; no privilege. PipeWire: a pool of buffers on a node's port.

    Examples
    --------
    >>> from memdesc.streams import Stream, Subscription
    >>> stream = Stream(shape=(2, 3), dtype="u1")
    >>> seat = stream.admit()
    >>> video = Subscription(stream.memory, seat.memory, stream.form, seat.depth, seat.loans)
    >>> with stream.loan() as slot:
    ...     slot.array[:] = 7
    >>> with video.take() as slot:
    ...     int(slot.array.sum())
    42
    """

    def __init__(
        self,
        *,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        nbytes: int | None = None,
        slots: int = 8,
        loans: int = 1,
        policies: Collection[Backpressure | str] = HARMLESS,
        wired: bool = False,
        pages: PageKind = PageKind.AUTO,
        name: str = "stream",
    ) -> None:
        self.form = form_of(slots, nbytes, shape, dtype)
        if not 1 <= check_integer(loans, "loans") <= slots - 2:
            raise InvalidArgument(
                f"{slots} slots with {loans} loans: there must be one loan, and room for it, for "
                "the latest slot, and for one subscriber",
                errno=errno.EINVAL,
            )
        self.name, self.loans = name, loans
        self.policies = frozenset(Backpressure(policy) for policy in policies)
        self.memory = BufferMemoryDescriptor(
            self.form.pool_bytes, wired=wired, pages=pages, name=name
        )
        self._number = self._waits = 0
        self._lock = lock_for(self)
        window = self.memory._export()
        self._begin(
            window,
            HEADER,
            self.form.slots,
            self.form.stride,
            self.form.nbytes,
            loans,
            self.form.array_maker(),
            encode,
        )
        register(self)

    # -- publishing ------------------------------------------------------------------------------

    def publish(
        self, data: Buffer | npt.ArrayLike, *, metadata: object = None, timeout: float | None = None
    ) -> None:
        """Copy data into a slot, and publish that. `loan` spares the copy.

        Parameters
        ----------
        data : buffer or array
            In a stream of bytes at most its `nbytes`; else an array of its shape.
        metadata : object, optional
            As `LoanedSlot.metadata`.
        timeout : float, optional
            As of `loan`.

        Raises
        ------
        RangeError
            It does not fit (EMSGSIZE), or the metadata does not.
        InvalidArgument
            An array of another shape, or of a dtype that NumPy does not cast to the stream's as
            ``casting="same_kind"``; numbers that the stream's dtype does not hold.
        TimedOutError, AllocationError, ClosedError
            As `loan`.
        """
        with self.loan(timeout) as slot:
            if self.form.dtype is None:
                source = memoryview(data).cast("B")  # type: ignore[arg-type]
                slot.nbytes = source.nbytes
                _core.copy_memory(slot.buffer, source)
            else:
                self._fill(slot.array, data)
            slot.metadata = metadata

    def _fill(self, slot: npt.NDArray[Any], data: Any) -> None:
        """Copy an array, or lists of numbers, into a slot: no floats as integers."""
        import numpy as np

        source = np.asarray(data)
        if source.shape != slot.shape:
            raise InvalidArgument(
                f"an array of shape {source.shape} for stream {self.name!r} of {slot.shape}",
                errno=errno.EINVAL,
            )
        # Python's integers have no dtype of their own: what counts is whether they fit.
        plain = isinstance(data, int | list | tuple) and source.dtype.kind in "iu"
        if plain and slot.dtype.kind in "iu" and source.size:
            limits = np.iinfo(slot.dtype)
            low, high = int(source.min()), int(source.max())
            if low < limits.min or high > limits.max:
                raise InvalidArgument(
                    f"numbers from {low} to {high} for stream {self.name!r} of {slot.dtype}, which "
                    f"holds {limits.min} to {limits.max}",
                    errno=errno.EINVAL,
                )
        elif not np.can_cast(source.dtype, slot.dtype, "same_kind"):
            raise InvalidArgument(
                f"an array of {source.dtype} for stream {self.name!r} of {slot.dtype}: give "
                f"data.astype({str(slot.dtype)!r}) if its values may be changed so",
                errno=errno.EINVAL,
            )
        np.copyto(slot, source, casting="unsafe")

    async def loan_async(self, timeout: float | None = None) -> _core.LoanedSlot:
        """As `loan`, for asyncio; for a ``with`` block. Cancelled, nothing is loaned.

        Waits for subscribers of policy BLOCK in one of at most 32 threads; of the other policies
        nobody is waited for, here too.

        Raises
        ------
        AllocationError
            As `loan`; or no thread can be started to wait in (EAGAIN).
        TimedOutError, ClosedError
            As `loan`.
        """
        slot = self._take()
        if slot is None:
            self._waits += 1
            slot = await until(
                self._take, self._room_awaited, timeout, lambda: self._no_room(timeout)
            )
        self._tidy()
        return slot

    async def _room_awaited(self) -> None:
        # No longer than a glance: so long the thread goes on where this is cancelled.
        await in_thread(lambda: self._wait_for_room(int(GLANCE * 1e9), 0, GLANCE))

    def _loan(self, timeout: float | None) -> _core.LoanedSlot:
        """Wait until every subscriber of policy BLOCK has room."""
        deadline = deadline_of(timeout)
        self._waits += 1
        spin = int(SPIN * 1e9)
        while left := time_left(deadline):
            if self._wait_for_room(int(min(left, GLANCE) * 1e9), spin, left):
                spin = int(SPIN * 1e9)
            else:
                spin = 0
            slot = self._take()
            if slot is not None:
                self._tidy()
                return slot
        raise self._no_room(timeout)

    def _wait_for_room(self, limit: int, spin: int, left: float) -> bool:
        """Wait for the subscriber that has none; False: in vain so far."""
        # Who waits already is waited for: a line has one wish at a time.
        if not self._lock.acquire(timeout=left):
            return False
        try:
            blocked = self._blocked()
            if blocked is None:
                return True
            line, wanted = blocked
            if line.sleep(wanted, spin, limit):
                return True
            subscriber: Subscriber = line.subscriber
            if subscriber.peer is not None and not subscriber.peer.alive:
                subscriber.drop()
            return False
        finally:
            self._lock.release()

    def _no_room(self, timeout: float | None) -> TimedOutError:
        blocked = self._blocked()
        who = "" if blocked is None else f" {blocked[0].subscriber.number}"
        return timed_out(
            timeout, f"stream {self.name!r}: subscriber{who} of policy BLOCK made no room"
        )

    # -- subscribers -----------------------------------------------------------------------------

    def admit(
        self,
        policy: Backpressure | str = Backpressure.DROP_OLDEST,
        *,
        depth: int = 4,
        loans: int = 2,
        latest: bool = True,
        notify: sockets.socket | None = None,
        peer: Task | None = None,
        ended: Callable[[str], None] | None = None,
    ) -> Subscriber:
        """Have one subscriber more. A `Service` does this for its clients.

        Parameters
        ----------
        policy : Backpressure, or its value
            What happens when it is too slow.
        depth : int
            Slots that are offered to it at a time.
        loans : int
            Slots that it may hold at a time.
        latest : bool
            Offer it at once what was published last, if anything was.
        notify : socket, optional
            The publisher's of `notification_pair`; duplicated.
        peer : Task, optional
            The subscriber's: a loan that waits for it notices when it has ended.
        ended : callable, optional
            Called once, with the reason, when all that it had has come back; must not wait.

        Raises
        ------
        AllocationError
            The slots do not suffice for it beside those who are there (EDQUOT).
        InvalidArgument
            The stream does not allow that policy, or the numbers make no sense (EINVAL).
        ClosedError
        """
        policy = Backpressure(policy)
        self._check(policy, depth, loans)
        self._refresh()
        self._tidy()
        most = self.form.slots - self.loans - 1
        needed = self._needed(CODES[policy], depth, loans, most)
        if needed > most:
            raise AllocationError(
                f"stream {self.name!r} of {self.form.slots} slots can leave {most} to its "
                f"subscribers; with this one (loans={loans}, depth={depth}, {policy.name}) they "
                f"would keep up to {needed}: make it with slots={self.form.slots + needed - most}",
                errno=errno.EDQUOT,
            )
        self._number += 1
        subscriber = Subscriber(self, self._number, policy, depth, loans, notify, peer, ended)
        fd = -1 if subscriber._socket is None else subscriber._socket.fileno()
        window = subscriber.memory._export()
        try:
            line = self._add(window, depth, loans, CODES[policy], fd, latest, subscriber)
        except BaseException:
            subscriber.finish(0)
            raise
        subscriber._line = weakref.ref(line)
        return subscriber

    def _needed(self, policy: int, depth: int, loans: int, most: int) -> int:
        """Slots that subscribers would keep with one more; those of who left go if need be."""
        for subscriber in self.subscribers():
            if subscriber.left and self._reserved(policy, depth, loans) > most:
                subscriber.drop()
        return self._reserved(policy, depth, loans)

    def _check(self, policy: Backpressure, depth: int, loans: int) -> None:
        if policy not in self.policies:
            allowed = ", ".join(sorted(policy.name for policy in self.policies))
            raise InvalidArgument(
                f"stream {self.name!r} does not allow {policy.name}: choose of {allowed}, or make "
                "it with policies=",
                errno=errno.EINVAL,
            )
        for what, value in (("depth", depth), ("loans", loans)):
            if not 1 <= check_integer(value, what) <= self.form.slots:
                raise InvalidArgument(
                    f"{what} is {value}: give 1 to {self.form.slots}, the stream's slots",
                    errno=errno.EINVAL,
                )
        if policy is Backpressure.BLOCK and depth <= self.loans:
            raise InvalidArgument(
                f"depth is {depth}: a subscriber of policy BLOCK needs more than the "
                f"{self.loans} that are loaned at a time",
                errno=errno.EINVAL,
            )

    def subscribers(self) -> list[Subscriber]:
        """List those whose slots have not all come back."""
        return [line.subscriber for line in self._lines()]

    def look(self) -> None:
        """Look what subscribers took and gave back. A loan does where it needs to know."""
        if self._state() == _OPEN and self._refresh():
            self._tidy()

    def _tidy(self) -> None:
        """Be done with the subscribers that are gone."""
        for line in self._gone():
            subscriber: Subscriber = line.subscriber
            reason = line.state()[1]
            (log.warning if reason in FAULTS else log.info)(
                "stream.subscriber_gone",
                extra={
                    "stream": self.name,
                    "subscriber": subscriber.number,
                    "why": REASONS[reason or 1],
                },
            )
            subscriber.finish(reason)

    # -- lifetime --------------------------------------------------------------------------------

    def statistics(self) -> StreamStatistics:
        """Tell what the stream did, and who has its slots now."""
        self.look()
        published, discarded, dropped, nbytes, free, loaned = self._counts()
        return StreamStatistics(
            published,
            discarded,
            dropped,
            nbytes,
            free,
            loaned,
            self._waits,
            tuple(statistics_of(line) for line in self._lines()),
        )

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._state() != _OPEN

    def close(self) -> None:
        """End the stream. Subscribers still take what was offered to them. Again is a no-op."""
        if self._state() != _OPEN:
            return
        subscribers = self.subscribers()
        self._close()
        for subscriber in subscribers:
            subscriber.finish(1)
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._lines())} subscribers"
        return f"<{type(self).__name__} {self.name!r}: {self.form.slots} slots, {state}>"

    def _inherit(self) -> None:
        """In a fork child: sockets are the parent's, else nobody would see it end."""
        for line in self._lines():
            if line.subscriber._socket is not None:
                line.subscriber._socket.close()

    def _closed(self) -> NoReturn:
        if self._state() == INHERITED:
            raise ClosedError(
                f"stream {self.name!r} belongs to the parent of this forked process: make one here"
            )
        raise ClosedError(f"stream {self.name!r} was closed")

    def _not_loaned(self, what: str) -> ClosedError:
        return ClosedError(f"this slot of stream {self.name!r} was {what}: loan another one")

    def _too_many_loans(self) -> NoReturn:
        raise tracing.blamed(
            AllocationError(
                f"stream {self.name!r} has {self.loans} slot(s) loaned, as many as may be at a "
                "time: publish or discard one, or make it with loans=",
                errno=errno.ENOBUFS,
            ),
            views_of=self.memory._window.memory,
            of=("LoanedSlot",),
        )

    def _check_nbytes(self, nbytes: Any) -> int:
        value = check_integer(nbytes, "nbytes")
        if self.form.dtype is not None and value != self.form.nbytes:
            raise InvalidArgument(
                f"slots of stream {self.name!r} are whole arrays of {self.form.nbytes:,} bytes",
                errno=errno.EINVAL,
            )
        if not 0 <= value <= self.form.nbytes:
            raise RangeError(
                f"{value:,} bytes do not fit into a slot of stream {self.name!r} of "
                f"{self.form.nbytes:,}: make it with nbytes={value}",
                errno=errno.EMSGSIZE,
            )
        return value
