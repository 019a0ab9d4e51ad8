"""Waiting in an asyncio event loop: for a descriptor, for another thread, for what only waits.

All that this library awaits comes to these. Any number of tasks may wait for one thing, in any
number of event loops; cancelling one of them takes nothing from the others. Each look is made in
the loop's own thread, and a task that is cancelled is so between two looks: so nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memdesc.errors import AllocationError, TimedOutError
from memdesc.vm.forks import tell_child
from memdesc.vm.telling import bare
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    import asyncio

_T = TypeVar("_T")

_MOST = 32
"""Threads that wait at a time. Of more that wait for one thing at once, most would only poll."""


class Alarm:
    """What one task waits for, and any thread sets off.

    Has a lock's `release`, so that it can stand among the waiters of a `Condition`.
    """

    def __init__(self) -> None:
        import asyncio

        self._rung: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def release(self) -> bool:
        """Set it off, from any thread; False where nobody hears it, as its loop was closed."""
        try:
            self._rung.get_loop().call_soon_threadsafe(self.ring)
        except RuntimeError:
            return False
        return True

    def ring(self) -> None:
        """Set it off, from its own loop."""
        if not self._rung.done():
            self._rung.set_result(None)

    async def wait(self) -> None:
        """Wait until it is set off."""
        await self._rung


class Sleepers(set[Alarm]):
    """All who await something of one object."""

    def wake(self) -> None:
        """Have all of them look again. From any thread."""
        for alarm in list(self):
            if not alarm.release():
                self.discard(alarm)  # it holds its task, which nobody will go on with


async def readable(fileno: Callable[[], int], sleepers: Sleepers | None = None) -> None:
    """Wait in the running event loop until a descriptor is readable, or the sleepers are woken.

    By a duplicate of it: so several tasks may wait for one, and its owner may close it meanwhile.

    Raises
    ------
    AllocationError
        This process has no descriptor left (EMFILE).
    """
    import asyncio

    alarm = Alarm()
    who = Sleepers() if sleepers is None else sleepers
    who.add(alarm)  # first: who closes it from here on wakes this one
    try:
        fd = fileno()
        try:
            own = os.dup(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                return  # closed just now: the next look says so
            raise AllocationError(
                f"can not wait in an event loop: {error.strerror}; close descriptors, or raise "
                "`ulimit -n`",
                errno=error.errno,
            ) from error
        try:
            loop = asyncio.get_running_loop()
            loop.add_reader(own, alarm.ring)
            try:
                await alarm.wait()
            finally:
                loop.remove_reader(own)
        finally:
            os.close(own)
    finally:
        who.discard(alarm)


class time_limit:
    """Cancel what is awaited inside when the time has run out, and raise what `late` gives."""

    def __init__(self, timeout: float | None, late: Callable[[], TimedOutError]) -> None:
        import asyncio

        check_timeout(timeout)
        self._limit = asyncio.timeout(timeout)
        self._late = late

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._limit.__aexit__(*raised)
        except TimeoutError as error:
            raise self._late() from bare(error)
        finally:
            del self, raised  # see telling: they know the task, which keeps what it fails with


async def until(
    look: Callable[[], _T | None],
    wait: Callable[[], Awaitable[None]],
    timeout: float | None,
    late: Callable[[], TimedOutError],
) -> _T:
    """Give what `look` gives once that is not None; between two looks await `wait()`."""
    found = look()
    if found is None:
        async with time_limit(timeout, late):
            while found is None:
                await wait()
                found = look()
    return found


async def happens(
    look: Callable[[], bool], wait: Callable[[], Awaitable[None]], timeout: float | None
) -> bool:
    """Await until `look` gives True; False where the time ran out."""
    try:
        await until(lambda: look() or None, wait, timeout, lambda: TimedOutError("not in time"))
    except TimedOutError:
        return False
    return True


class _Threads:
    """Threads for what can only be waited for, as long as there is some."""

    def __init__(self) -> None:
        self._inherit()

    def _inherit(self) -> None:
        """In a fork child: there are none."""
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._running = 0

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done, soon."""
        tell_child(self)
        with self._lock:
            self._jobs.append(job)
            if self._running == _MOST:
                return
            self._running += 1
        try:
            threading.Thread(target=self._work, name="memdesc-wait", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._running -= 1
                if self._running or job not in self._jobs:
                    return  # those that there are do it
                self._jobs.remove(job)
            raise AllocationError(
                f"no thread can be started to wait in: {error}; raise `ulimit -u`",
                errno=errno.EAGAIN,
            ) from error

    def _work(self) -> None:
        jobs: list[Callable[[], None]] = []
        while True:
            with self._lock:
                if not self._jobs:
                    self._running -= 1
                    return
                jobs.append(self._jobs.popleft())
            jobs.pop()()  # see telling: in a variable, it would be found from what it raised


_threads = _Threads()


async def in_thread(
    call: Callable[[], _T], unwanted: Callable[[_T], object] = lambda _: None
) -> _T:
    """Wait in a thread for a call that waits; what it gives after a cancelling is `unwanted`.

    Raises
    ------
    AllocationError
        No thread can be started (EAGAIN).
    """
    import asyncio

    loop = asyncio.get_running_loop()
    given: asyncio.Future[_T] = loop.create_future()

    _threads.do(partial(_work, call, loop, given, unwanted))
    try:
        return await given
    except BaseException:
        if given.done() and not given.cancelled() and given.exception() is None:
            unwanted(given.result())  # it came, and nobody will see it
        raise
    finally:
        del given  # see telling: it keeps what is raised


def _work(
    call: Callable[[], _T],
    loop: asyncio.AbstractEventLoop,
    given: asyncio.Future[_T],
    unwanted: Callable[[_T], object],
) -> None:
    """Call, and tell who awaits it what it gave or raised. In a thread."""
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 (it goes to who awaits)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_refuse, given, error)
    else:
        try:
            loop.call_soon_threadsafe(_give, given, result, unwanted)
        except RuntimeError:
            unwanted(result)
    finally:
        del given  # see telling: it keeps what was raised


def _give(given: asyncio.Future[_T], result: _T, unwanted: Callable[[_T], object]) -> None:
    if given.done():
        unwanted(result)
    else:
        given.set_result(result)


def _refuse(given: asyncio.Future[Any], error: BaseException) -> None:
    if not given.done():
        given.set_exception(error)
