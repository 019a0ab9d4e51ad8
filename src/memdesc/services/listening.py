"""Events: what a connection has of what its service tells."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MemdescError,
    ProtocolError,
    TimedOutError,
)
from memdesc.loop import Loop, tell_if_forked
from memdesc.memory.closing import no_descriptor
from memdesc.services import protocol
from memdesc.services.arrivals import Arrivals
from memdesc.services.limits import Limits
from memdesc.services.link import Link
from memdesc.vm.awaiting import time_limit
from memdesc.vm.forks import Condition
from memdesc.vm.task import Task
from memdesc.vm.timeouts import deadline_of

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Event:
    """What a service told of.

    Attributes
    ----------
    name : str
    value : object
        The latest.
    count : int
        How often the service told of that name since the last event that was read here; 1 where
        none was left out.
    """

    name: str
    value: Any
    count: int


class Listening(Link):
    """What a connection has of it."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(name, sock, task, limits, allow_copy=allow_copy)
        self._listeners: dict[str, weakref.WeakSet[Events]] = {}
        # Names that the service may tell of: with the latest question about each.
        self._asked: dict[str, int] = {}
        self._leaving: dict[int, str] = {}  # names by the question that ends them

    def events(self, *names: str, timeout: float | None = 5.0) -> Events:
        """Listen to events of the service: what it tells of from now on.

        Parameters
        ----------
        *names : str
            As the service tells them. They need not exist yet.
        timeout : float, optional
            Seconds to wait for the service's answer; None waits for ever.

        Returns
        -------
        Events
            Keeps the connection. Several may listen to one name: each gets all.

        Raises
        ------
        LimitError
            This client listens to as many names as the service lets it (EDQUOT).
        InvalidArgument, TimedOutError, PeerGoneError, ClosedError

        Examples
        --------
        >>> import memdesc as md
        >>> with md.Service("window") as window, md.connect("window") as connection:
        ...     with connection.events("resized") as events:
        ...         told = window.notify("resized", [640, 480])
        ...         events.get(timeout=5.0)
        Event(name='resized', value=[640, 480], count=1)
        """
        wanted = _check_names(names)
        until = deadline_of(timeout)
        events = Events(self, wanted)
        try:
            for name in wanted:
                left = None if until is None else max(until - time.monotonic(), 0.05)
                self.request(self._listen_to(name, events), protocol.Done, timeout=left)
        except BaseException:
            events.close()
            raise
        return events

    async def events_async(self, *names: str, timeout: float | None = 5.0) -> Events:
        """As `events`, for asyncio."""
        wanted = _check_names(names)
        events = Events(self, wanted)
        try:
            async with time_limit(timeout, lambda: self._silent("Listen", timeout)):
                for name in wanted:
                    question = self._listen_to(name, events)
                    await self.request_async(question, protocol.Done, timeout=None)
        except BaseException:
            events.close()
            raise
        return events

    def _listen_to(self, name: str, events: Events) -> protocol.Listen:
        with self._lock:  # no Unlisten of another thread comes between, nor after
            number = self._asked[name] = self.next_id()
            self._listeners.setdefault(name, weakref.WeakSet()).add(events)
        return protocol.Listen(number, name)

    def _unlisten(self, events: Events | None, names: tuple[str, ...]) -> None:
        """Have the service no longer tell what nobody listens to any more."""
        with self._lock:
            for name in names:
                listening = self._listeners.get(name)
                if listening is not None and events is not None:
                    listening.discard(events)
                if not listening and self._listeners.pop(name, None) is not None:
                    number = self._asked[name] = self.next_id()
                    self._leaving[number] = name
                    self._send_if_there(protocol.Unlisten(number, name))

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Notify):
            self._notified(message)
        else:
            super()._handle(message, fds, lost)

    def _notified(self, message: protocol.Notify) -> None:
        value = bytes(message.value)
        protocol.decode_value(value)
        with self._lock:
            if message.name not in self._asked:
                raise ProtocolError(
                    f"the event {message.name[:80]!r}, which was not asked for", errno=errno.EPROTO
                )
            listening = list(self._listeners.get(message.name, ()))
        for events in listening:
            events._put(message.name, value, message.count)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        with self._lock:
            name = self._leaving.pop(answer.id, None)
            if name is not None:
                if self._asked.get(name) == answer.id:  # else it is listened to once more
                    del self._asked[name]
                return
        super()._answered(answer, fds, lost)

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            listening = {events for those in self._listeners.values() for events in those}
            self._listeners.clear()
            self._asked.clear()
            self._leaving.clear()
        for events in listening:
            events._over()


class _Bell:
    """An eventfd of this process that is readable while something waits; made when asked for."""

    def __init__(self) -> None:
        self.fd = -1

    def open(self, *, rung: bool) -> int:
        if self.fd < 0:
            try:
                self.fd = os.eventfd(int(rung), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as error:
                raise no_descriptor("wait for events", error) from error
        return self.fd

    def ring(self) -> None:
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@final
class Events(Arrivals[Event]):
    """Events of a service, as they come; made by `Connection.events`.

    Iterate over it, with ``for`` or ``async for``; or `get`; or wait for `fileno` in any event
    loop, then `try_get` until it gives None. What came before the end of the connection is given
    first; then each call raises what ended it. Iteration ends quietly when this is closed.

    Attributes
    ----------
    names : tuple of str
        What it listens to.

    Notes
    -----
    At most one event of each name waits here: later ones take its place, and are counted.
    Threads: safe; each event goes to one. Fork: closed in the child. I/O Kit: IOUserClient's
    notification ports.
    """

    def __init__(self, connection: Listening, names: tuple[str, ...]) -> None:
        self.names = names
        self._connection = connection
        self._changed = Condition()
        self._waiting: dict[str, tuple[bytes, int]] = {}
        self._closed = self._inherited = False
        self._bell = _Bell()
        self._finalizer = weakref.finalize(
            self, _abandon, connection._loop, weakref.ref(connection), names, self._bell
        )
        self._finalizer.atexit = False
        tell_if_forked(self)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._closed

    def get(self, timeout: float | None = None) -> Event:
        """Give the next event, waiting for it.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.

        Raises
        ------
        TimedOutError
            None came in time (ETIMEDOUT).
        PeerGoneError, ProtocolError
            The connection ended.
        ClosedError
            This, or the connection, was closed; or belongs to the parent of this forked process.
        """
        return _event(self._changed.wait_for(self._take, timeout, lambda: self._nothing(timeout)))

    def try_get(self) -> Event | None:
        """Give the next event, or None where none waits. Raises as `get`."""
        with self._changed:
            found = self._take()
        return None if found is None else _event(found)

    def _nothing(self, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"none of the events {', '.join(map(repr, self.names))} in {timeout} s",
            errno=errno.ETIMEDOUT,
        )

    def _take(self) -> tuple[str, bytes, int] | None:
        if self._inherited:
            raise ClosedError("these events belong to the parent of this forked process")
        if self._closed:
            raise ClosedError("these events were closed: listen once more")
        for name, (value, count) in self._waiting.items():
            del self._waiting[name]
            if not self._waiting and not self._connection.closed:
                self._bell.hush()
            return name, value, count
        if self._connection.closed:
            raise self._connection._gone_again()
        return None

    def fileno(self) -> int:
        """Give the descriptor that an event loop waits on.

        Readable while an event waits, and from the connection's end on. Only to be waited for.

        Raises
        ------
        AllocationError
            This process has no descriptor left (EMFILE).
        ClosedError
        """
        with self._changed:
            if self._closed:
                raise ClosedError("these events were closed: listen once more")
            return self._bell.open(rung=bool(self._waiting) or self._connection.closed)

    def close(self) -> None:
        """Listen no longer; what waits is dropped. Who waits in `get` gets `ClosedError`.

        Again is a no-op.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._finalizer.detach()
            self._waiting.clear()
            self._bell.ring()  # duplicates of it, that tasks wait on, outlive it
            self._bell.close()
            self._changed.notify_all()
        self._connection._unlisten(self, self.names)

    def _put(self, name: str, value: bytes, count: int) -> None:
        """Take what came, in the place of what waits. On the I/O thread."""
        with self._changed:
            if self._closed:
                return
            if not self._waiting:
                self._bell.ring()
            self._waiting[name] = value, self._waiting.get(name, (b"", 0))[1] + count
            self._changed.notify()

    def _over(self) -> None:
        """Have all who wait see that the connection ended. On the I/O thread."""
        with self._changed:
            self._bell.ring()
            self._changed.notify_all()

    def forked(self) -> None:
        """In a fork child: these events stay the parent's."""
        self._changed = Condition()  # another thread of the parent may have held it
        self._finalizer.detach()
        self._closed = self._inherited = True
        self._bell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._waiting)} waiting"
        return f"<Events {', '.join(map(repr, self.names))}: {state}>"


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise InvalidArgument("events() without a name: give at least one", errno=errno.EINVAL)
    return tuple(dict.fromkeys(protocol.check_name(name, "an event") for name in names))


def _event(found: tuple[str, bytes, int]) -> Event:
    name, value, count = found
    return Event(name, protocol.decode_value(value), count)


def _abandon(
    io: Loop, connection: weakref.ref[Listening], names: tuple[str, ...], bell: _Bell
) -> None:
    """Listen no longer, when events were dropped without close(). Takes no lock."""
    bell.close()

    def unlisten() -> None:
        alive = connection()
        if alive is not None:
            alive._unlisten(None, names)

    io.post(unlisten)
