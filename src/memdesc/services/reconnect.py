"""Reconnecting: a connection that finds the next service of its name."""

from __future__ import annotations

import functools
import inspect
import os
import select
from typing import Any, Self, final

from memdesc.errors import ClosedError, MemdescError
from memdesc.services.connection import Connection, reach, reach_async
from memdesc.vm.forks import lock_for

_GLANCE = 0.005
"""Seconds between two looks at whether somebody else has connected."""


@final
class ReconnectingConnection(Connection):
    """A connection to whichever service has a name; made by `connect(…, reconnect=True)`.

    It holds one `Connection` at a time and asks that for whatever it is asked. Once that has
    ended, or its service was succeeded by another, the next operation connects again, waiting up
    to the `timeout` of `connect`.

    Nothing is done twice: what waits when the service ends raises `PeerGoneError` at once, and
    whether it was done there nobody knows. Nothing is done again by itself either: what belongs
    to the service that ended (mappings pushed by it, `wait_length`'s watch, queues, events,
    subscriptions) ended with it, and the program asks the next one for its own. What this program
    has mapped stays readable.

    Attributes
    ----------
    generation : int
        How many services it has been connected to: a program that looks at it before and after
        knows whether it talks to another one. Reading it does not connect.

    Notes
    -----
    Threads: safe; one connects, the others wait for it. Fork: the child connects for itself, at
    its next operation.
    """

    def __init__(self, way: dict[str, Any], first: Connection) -> None:
        # Not that of Connection: this one has no socket of its own.
        self.name = way["name"]
        self._way = way
        self._lock = lock_for(self)
        self._connecting = 0
        """The process of which a task of an event loop connects; 0: none."""
        self._ended_here = False
        self._current = first
        self.generation = 1

    def _alive(self) -> Connection | None:
        """Give the connection if it lives, as far as is known here; takes no lock."""
        current = self._current
        if self._ended_here or current.closed or current.moved or _has_hung_up(current):
            return None
        return current

    def _living(self) -> Connection:
        """Give a connection that lives, connecting if need be."""
        with self._lock:
            self._check_not_ended()
            if self._alive() is None:
                old = self._current
                try:
                    self._follow(reach(**self._way))
                except MemdescError:
                    if not _stays(old):
                        raise
            return self._current

    async def _living_async(self) -> Connection:
        """As `_living`, in an event loop: one task connects, the others wait for it."""
        import asyncio

        while (living := self._alive()) is None:
            self._check_not_ended()
            if self._connecting == os.getpid():
                await asyncio.sleep(_GLANCE)
                continue
            self._connecting, old = os.getpid(), self._current
            try:
                found = await reach_async(**self._way)
            except MemdescError:
                if _stays(old):
                    return old
                raise
            finally:
                self._connecting = 0
            if self._current is not old or not self._lock.acquire(blocking=False):
                found.close()  # a thread has connected, or does so, perhaps for ever
                await asyncio.sleep(_GLANCE)
                continue
            try:
                self._follow(found)
            finally:
                self._lock.release()
        return living

    def _check_not_ended(self) -> None:
        if self._ended_here:
            raise ClosedError(f"the connection to {self.name!r} was closed here")

    def _follow(self, found: Connection) -> None:
        # Who still waits on the old one holds it; it is closed with the last of them.
        self._current = found
        self.generation += 1
        if self.closed:  # meanwhile, by another thread
            found.close()

    def __enter__(self) -> Self:
        self._check_not_ended()
        return self

    @property
    def closed(self) -> bool:
        """Whether it was closed here. Between two services it is not."""
        return self._ended_here

    def close(self) -> None:
        """End it, and connect no more. Again is a no-op.

        A thread that is connecting goes on until its service appears or its time is over.
        """
        self._ended_here = True  # without the lock, which who connects holds, perhaps for ever
        self._current.close()

    def __getattr__(self, name: str) -> Any:
        """Give what only the connection itself has: its fields."""
        if name in ("_current", "_lock"):  # not even made
            raise AttributeError(name)
        return getattr(self._living(), name)

    def __repr__(self) -> str:
        state = "closed" if self._ended_here else f"generation {self.generation}"
        return f"<ReconnectingConnection to {self.name!r}: {state}>"


def _stays(old: Connection) -> bool:
    """Go on with a connection for which no other was found; False where it does not live."""
    if old.closed or _has_hung_up(old):
        return False
    old.stay()  # its successor has gone; who was succeeded is still there
    return True


def _has_hung_up(connection: Connection) -> bool:
    """Whether the other side has ended, also where the I/O thread has not come to it yet."""
    poll = select.poll()
    try:
        poll.register(connection._sock, 0)  # POLLHUP is always told
    except ValueError:
        return True  # it was closed just now
    return bool(poll.poll(0))


def _forward(name: str, original: Any) -> Any:
    """Make what asks the living connection in place of a method, or a property, of Connection."""
    if isinstance(original, property):
        return property(lambda self: getattr(self._living(), name), doc=original.__doc__)

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def coroutine(self: ReconnectingConnection, *args: Any, **kwargs: Any) -> Any:
            living = self._alive() or await self._living_async()
            return await getattr(living, name)(*args, **kwargs)

        return coroutine

    @functools.wraps(original)
    def method(self: ReconnectingConnection, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._living(), name)(*args, **kwargs)

    return method


for _name in dir(Connection):
    _original = inspect.getattr_static(Connection, _name)
    if _name.startswith("__") or _name in vars(ReconnectingConnection):
        continue
    if inspect.isfunction(_original) or isinstance(_original, property):
        setattr(ReconnectingConnection, _name, _forward(_name, _original))
