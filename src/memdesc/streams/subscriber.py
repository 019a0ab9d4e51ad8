"""Subscriber: one subscriber of a stream, as its publisher has it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from memdesc import _core
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.memory.memfd import fitting_name
from memdesc.memory.page_kinds import PageKind
from memdesc.queues.notify import own_socket
from memdesc.vm.pages import Access, by_name
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import socket as sockets

    from memdesc.streams.publisher import Stream


class Backpressure(Enum):
    """What happens when a subscriber has `depth` slots offered and has not taken them."""

    DROP_OLDEST = "drop_oldest"
    """The oldest offer is taken back: it misses some, and the publisher never waits."""
    BLOCK = "block"
    """The publisher waits for it: it misses none, and can hold up the publisher and all others."""
    DROP_NEWEST = "drop_newest"
    """It is not offered what comes meanwhile."""
    DISCONNECT = "disconnect"
    """It is dropped."""

    @classmethod
    def _missing_(cls, value: object) -> Backpressure:
        return by_name(cls, value, "policy")


CODES = {policy: code for code, policy in enumerate(Backpressure)}

HARMLESS = frozenset(set(Backpressure) - {Backpressure.BLOCK})
"""The policies by which no subscriber can hold up the publisher."""

_GONE = 3
_DROPPED = 4
REASONS = {
    1: "left",
    2: "was too slow",
    3: "wrote what can not be, or held too many slots",
    4: "was dropped",
}
FAULTS = (2, 3)
"""Those that are the subscriber's."""
BROKE = REASONS[3]


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """One subscriber, as the publisher last looked.

    Attributes
    ----------
    number : int
    policy : Backpressure
    offers, dropped : int
        Slots offered to it; those taken back, or not offered, since it was too slow.
    pending, held : int
        Slots offered to it and not taken now; taken and not given back.
    notifications : int
        How often it was woken.
    """

    number: int
    policy: Backpressure
    offers: int
    dropped: int
    pending: int
    held: int
    notifications: int


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """What a stream did since it was made.

    Attributes
    ----------
    published, discarded : int
        Slots.
    dropped : int
        Slots that a subscriber missed, since it was too slow: of all that there ever were.
    nbytes : int
        Published.
    free, loaned : int
        Slots now. The others are offered, held, or the latest.
    waits : int
        Loans that had to wait for a subscriber of policy BLOCK.
    subscribers : tuple of SubscriberStatistics
    """

    published: int
    discarded: int
    dropped: int
    nbytes: int
    free: int
    loaned: int
    waits: int
    subscribers: tuple[SubscriberStatistics, ...]


class Subscriber:
    """One subscriber, as the publisher has it; made by `Stream.admit`.

    Attributes
    ----------
    number : int
        Counts the stream's subscribers, from 1.
    policy : Backpressure
    depth, loans : int
    left : bool
        Whether `leave` was called.
    memory : BufferMemoryDescriptor
        What publisher and subscriber share; to be handed over to it alone, for writing.
    """

    def __init__(
        self,
        stream: Stream,
        number: int,
        policy: Backpressure,
        depth: int,
        loans: int,
        notify: sockets.socket | None,
        peer: Task | None,
        ended: Callable[[str], None] | None,
    ) -> None:
        self.number, self.policy, self.depth, self.loans = number, policy, depth, loans
        self.memory = BufferMemoryDescriptor(
            stream.form.line_bytes(depth),
            max_access=Access.READ_WRITE,
            pages=PageKind.BASE,
            recycle=False,
            name=fitting_name(stream.name, "-line"),
        )
        self.peer = peer
        self.left = False
        self._socket = own_socket(notify)
        self._told = ended
        # Weak, both: else a stream that is dropped would have to wait for the collector.
        self._stream = weakref.ref(stream)
        self._line: Callable[[], _core.StreamLine | None] = no_line
        if self._socket is not None:
            weakref.finalize(self, self._socket.close).atexit = False

    @property
    def gone(self) -> bool:
        """Whether all that it had has come back."""
        line = self._line()
        return line is None or line.state()[0] == _GONE

    def drop(self) -> None:
        """Have its slots back at once: its task has ended, or is to have no more."""
        stream, line = self._stream(), self._line()
        if stream is not None and line is not None:
            stream._end(line, _DROPPED, False)
            stream._tidy()

    def leave(self) -> None:
        """Offer it nothing more. What it holds it has until it gives that back, or is dropped.

        It is dropped too when somebody else needs the room.
        """
        stream, line = self._stream(), self._line()
        self.left = True
        if stream is not None and line is not None:
            stream._end(line, _DROPPED, True)
            stream._tidy()

    def finish(self, reason: int) -> None:
        """All has come back, or the stream has ended."""
        self._line = no_line
        self.memory.close()
        if self._socket is not None:
            self._socket.close()
        told, self._told = self._told, None
        if told is not None:
            told(REASONS[reason or 1])


def no_line() -> None:
    """Stand for the line of a subscriber that has none."""


def statistics_of(line: _core.StreamLine) -> SubscriberStatistics:
    offers, dropped, rung, pending, held = line.counts()
    subscriber: Subscriber = line.subscriber
    return SubscriberStatistics(
        subscriber.number, subscriber.policy, offers, dropped, pending, held, rung
    )
