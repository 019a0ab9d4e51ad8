"""Connecting from an asyncio program."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memdesc.errors import AllocationError
from memdesc.loop import tell_if_forked
from memdesc.services.connection import Connection, connect

if TYPE_CHECKING:
    from asyncio import Future


_MOST = 32
"""Of more that connect at once, most would only poll: a listening socket takes 128 at a time."""


class _Threads:
    """Threads for what waits, as long as there is some."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """In a fork child: there are none."""
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._running = 0

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done, soon."""
        tell_if_forked(self)
        with self._lock:
            self._jobs.append(job)
            if self._running == _MOST:
                return
            self._running += 1
        try:
            threading.Thread(target=self._work, name="memdesc-connect", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._running -= 1
                if self._running or job not in self._jobs:
                    return  # those that there are do it
                self._jobs.remove(job)
            raise AllocationError(
                f"no thread can be started to connect in: {error}; raise `ulimit -u`",
                errno=errno.EAGAIN,
            ) from error

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running -= 1
                    return
                job = self._jobs.popleft()
            job()


_threads = _Threads()


async def connect_async(name: str, **options: Any) -> Connection:
    """As `connect`, without holding the event loop up.

    A connection ends with ``async with`` too; `Connection.call_async` calls the service. Cancelled,
    it leaves nothing: what comes of it is closed.

    Parameters
    ----------
    name : str
        As given to `Service`.
    **options
        As of `connect`.

    Notes
    -----
    It waits in one of at most 32 threads, which end when nobody connects any more. Where none can
    be started it raises `AllocationError` (EAGAIN).

    Examples
    --------
    >>> import asyncio
    >>> import memdesc as md
    >>> async def main():
    ...     with md.Service("greeter") as service:
    ...         @service.method
    ...         async def greet(name: str) -> str:
    ...             return f"hello {name}"
    ...         async with await connect_async("greeter") as client:
    ...             return await client.call_async("greet", "you")
    >>> asyncio.run(main())
    'hello you'
    """
    import asyncio

    events = asyncio.get_running_loop()
    made: Future[Connection] = events.create_future()

    def tell(connection: Connection | None, error: BaseException | None) -> None:
        if made.done():  # cancelled
            if connection is not None:
                connection.close()
        elif error is not None:
            made.set_exception(error)
        elif connection is not None:
            made.set_result(connection)

    def work() -> None:
        connection, failure = None, None
        try:
            connection = connect(name, **options)
        except BaseException as error:  # noqa: BLE001 (it goes to who awaits)
            failure = error
        try:
            events.call_soon_threadsafe(tell, connection, failure)
        except RuntimeError:  # the loop was closed meanwhile
            if connection is not None:
                connection.close()

    _threads.do(work)
    return await made
