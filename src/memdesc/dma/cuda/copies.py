"""Copies between registered memory and a device: started, seen to their end, awaited.

A copy under way holds the pages' registration, whoever else lets go of it, so that nothing is
unregistered or unmapped beneath it; the books of this module hold the copy. It is over when its
event says so.

Nothing here runs in a thread of CUDA's (cudaLaunchHostFunc): Python there would need the GIL
while the driver holds its own locks, and whoever holds the GIL and calls the driver, as other
libraries do, would wait for those: a deadlock. Whoever awaits a copy is told by a thread of ours
that sleeps in cudaEventSynchronize, without the GIL.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memdesc.dma.cuda.driver import CAPTURING, Driver, Kind
from memdesc.dma.cuda.place import Place
from memdesc.dma.cuda.registrations import Claim
from memdesc.errors import ClosedError, DeviceError
from memdesc.queues.waiting import time_left, timed_out
from memdesc.vm.forks import lock_for, tell_child
from memdesc.vm.timeouts import SPIN, deadline_of

if TYPE_CHECKING:
    import asyncio

    from memdesc.dma.cuda.device import CudaDevice

Span = tuple[int, int, int]
"""(to, source, bytes): of one call."""

_NAP, _LONGEST_NAP = 1 / 64, 250e-6
"""A wait sleeps for that share of its time so far before it looks again; so many seconds at most.

For so long a copy that is over may wait to be seen.
"""

_SPARE = 64
"""Events that a device keeps for its next copies."""

_in_flight: dict[Copy, Handle] = {}


class Handle:
    """A stream or an event of a device's, which goes with its last holder."""

    _made = False

    def __init__(
        self,
        place: Place,
        make: Callable[[Driver], int],
        destroy: Callable[[Driver, int], None],
    ) -> None:
        self._place, self._destroy = place, destroy
        with place.current() as driver:
            self.handle = make(driver)
            self._made = True

    def __del__(self) -> None:
        if self._made and not sys.is_finalizing():
            with contextlib.suppress(DeviceError, ClosedError), self._place.current() as driver:
                self._destroy(driver, self.handle)


def new_event(place: Place) -> Handle:
    """Make an event."""
    return Handle(
        place,
        lambda driver: driver.create_event(),
        lambda driver, handle: driver.destroy_event(handle),
    )


def new_stream(place: Place) -> Handle:
    """Make a stream."""
    return Handle(
        place,
        lambda driver: driver.create_stream(),
        lambda driver, handle: driver.destroy_stream(handle),
    )


class Copy:
    """A copy between registered memory and a device. Made by `PinnedMemory`.

    Awaiting it waits without blocking the event loop, in a thread of ours; cancelled, that ends
    at once and the copy goes on. Dropping it changes nothing either: the memory stays registered
    and mapped until the device is done.

    Attributes
    ----------
    nbytes : int

    Notes
    -----
    Threads: safe. Fork: the parent's; in the child every question raises `ClosedError`.
    """

    def __init__(
        self, device: CudaDevice, claim: Claim, stream: Handle | int, kind: Kind, nbytes: int
    ) -> None:
        self.nbytes = nbytes
        self._place, self._kind = device.place, kind
        self._events = device._events  # where an event goes that is not needed any more
        self._claim: Claim | None = claim
        self._stream: Handle | int = stream
        self._event: Handle | None = None
        self._giving = True  # to its stream: till then nothing can be known of it
        self._recorded = False
        self._watched = False
        self._over = False
        self._failure: tuple[str, int | None, int, str] | None = None
        self._seen = False  # whether somebody asked how it ended

    # -- its way ---------------------------------------------------------------------------------

    def _begin(self, spans: Sequence[Span]) -> None:
        """Give it to the stream. Where that fails, nothing of it is under way any more."""
        stream = self._stream.handle if isinstance(self._stream, Handle) else self._stream
        try:
            event = self._events.pop()
        except IndexError:
            event = new_event(self._place)
        given = 0
        self._event = event
        _in_flight[self] = event  # before it is: an interrupt comes anywhere
        try:
            with self._place.current() as driver:
                for to, source, nbytes in spans:
                    driver.copy(to, source, nbytes, self._kind, stream)
                    given += 1
                driver.record_event(event.handle, stream)
                self._recorded = True
        except BaseException as error:
            self._giving = False
            if isinstance(error, DeviceError) and not given:
                self._finish(None)
            else:
                # There is no event: wait for all that the stream has. A second interrupt ends
                # the waiting; the memory is then held until a later call finds the stream done.
                self._wait(None)
            raise
        self._giving = False

    def _look(self) -> None:
        event, stream = self._event, self._stream
        if event is None or self._giving:
            return  # another thread saw it end, or is about to begin it
        try:
            with self._place.current() as driver:
                if self._recorded:
                    done = driver.event_done(event.handle)
                else:
                    handle = stream.handle if isinstance(stream, Handle) else stream
                    done = driver.stream_done(handle)
        except DeviceError as error:
            if error.code in CAPTURING:
                raise  # it tells nothing of this copy
            self._finish(error)
        else:
            if done:
                self._finish(None)

    def _finish(self, error: DeviceError | None) -> None:
        if error is not None and not self._over:
            way = "to" if self._kind is Kind.TO_DEVICE else "from"
            self._failure = (
                f"copying {self.nbytes:,} bytes {way} {self._place.name}: {error.message}",
                error.errno,
                error.code,
                error.name,
            )
        self._over = True
        event = _in_flight.pop(self, None)  # of several threads one gets it
        self._claim = self._event = None
        if event is not None and not self._watched and len(self._events) < _SPARE:
            self._events.append(event)

    def _result(self) -> None:
        self._seen = True
        if self._failure is not None:
            message, number, code, name = self._failure
            raise DeviceError(message, errno=number, code=code, name=name)

    # -- asking ----------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether it is over, and not well; `wait` raises why."""
        return self.done and self._failure is not None

    @property
    def done(self) -> bool:
        """Whether it is over, well or not. Never waits.

        Raises
        ------
        DeviceError
            CUDA allows no such question now, while some stream is being captured into a graph.
        ClosedError
            In a fork child.
        """
        if not self._over:
            self._look()
        return self._over

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is over; signal handlers run meanwhile.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.

        Raises
        ------
        DeviceError
            It failed, or something did that its stream was given before; the bytes are undefined.
        TimedOutError
            It is still under way (ETIMEDOUT; EAGAIN where no time was given).
        ClosedError
            In a fork child.
        """
        if not self._wait(timeout):
            raise timed_out(timeout, f"a copy of {self.nbytes:,} bytes is still under way")
        self._result()

    def _wait(self, timeout: float | None) -> bool:
        """Spin for what one waking costs, then look again and again, ever less often."""
        deadline = deadline_of(timeout)
        began = time.monotonic()
        while not self.done:
            left = time_left(deadline)
            if not left:
                return False
            waited = time.monotonic() - began
            if waited > SPIN:
                time.sleep(min(waited * _NAP, _LONGEST_NAP, left))
        return True

    def __await__(self) -> Generator[Any, None, None]:
        return self._awaited().__await__()

    async def _awaited(self) -> None:
        import asyncio  # it is large, and most wait otherwise

        while not self.done:
            self._watched = True  # first: nobody else is to get the event meanwhile
            event = self._event
            if event is not None:
                over = asyncio.get_running_loop().create_future()
                _watchers.watch(self._place, self._stream, event, partial(_tell, over))
                await over
        self._result()

    def __repr__(self) -> str:
        way = "to" if self._kind is Kind.TO_DEVICE else "from"
        state = "failed" if self._failure else "over" if self._over else "under way"
        return f"<Copy of {self.nbytes:,} bytes {way} {self._place.name}: {state}>"


def _tell(over: asyncio.Future[None]) -> None:
    """Have the loop know, from another thread."""
    with contextlib.suppress(RuntimeError):  # it was closed meanwhile
        over.get_loop().call_soon_threadsafe(_set, over)


def _set(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def under_way(claim: Claim) -> list[Copy]:
    """Give the copies that hold a claim and are not over; looks at each."""
    return [copy for copy in list(_in_flight) if copy._claim is claim and not copy.done]


def settle(beyond: int = 0) -> None:
    """Let go of what is over, the oldest first, where more than so many are known."""
    if len(_in_flight) <= beyond:
        return
    while (oldest := next(iter(_in_flight), None)) is not None and oldest.done:
        _in_flight.pop(oldest, None)  # where who saw its end did not come that far


class _Watchers:
    """Threads that sleep until an event has happened; one for each stream that is awaited.

    A stream's events happen in their order. A thread ends when its stream has none left.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int, int], deque[tuple[Handle, Callable[[], None]]]] = {}
        self._lock = lock_for(self)
        tell_child(self)

    def watch(
        self,
        place: Place,
        stream: Handle | int,
        event: Handle,
        tell: Callable[[], None],
    ) -> None:
        """Have `tell` called when an event of that stream has happened."""
        handle = stream.handle if isinstance(stream, Handle) else stream
        key = (id(place.driver), place.index, handle)
        with self._lock:
            queue = self._queues.get(key)
            if queue is not None:
                queue.append((event, tell))
                return
            queue = self._queues[key] = deque([(event, tell)])
            try:
                threading.Thread(
                    target=self._run, args=(place, key, queue), name="memdesc-cuda", daemon=True
                ).start()
            except BaseException:
                del self._queues[key]
                raise

    def _run(
        self,
        place: Place,
        key: tuple[int, int, int],
        queue: deque[tuple[Handle, Callable[[], None]]],
    ) -> None:
        while True:
            with self._lock:
                if not queue:
                    if self._queues.get(key) is queue:
                        del self._queues[key]
                    return
                event, tell = queue.popleft()
            with contextlib.suppress(DeviceError):  # why it failed, who awaits it finds out
                if place.driver.get_device() != place.index:
                    place.driver.set_device(place.index)  # for good: the thread is ours
                place.driver.wait_event(event.handle)
            tell()
            del event, tell

    def _inherit(self) -> None:
        self._queues.clear()


_watchers = _Watchers()


class _Forks:
    """In a fork child: copies are the parent's."""

    def _inherit(self) -> None:
        _in_flight.clear()


_forks = _Forks()
tell_child(_forks)
