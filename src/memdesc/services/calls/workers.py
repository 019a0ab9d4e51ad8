"""The threads and the event loop that handlers run in: never the I/O thread.

Client tasks take turns, one job each, and none has more than half of the threads: one that asks
without end, or whose calls never end, leaves room for the others.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from memdesc.errors import AllocationError, ClosedError, InvalidArgument
from memdesc.memory.closing import no_descriptor
from memdesc.vm.pages import check_integer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

log = logging.getLogger("memdesc.services")
WORKERS = 8
_JOIN = 1.0
"""Seconds that the end waits for a handler that runs: then it goes on alone."""

Job = Callable[[], None]


class Workers:
    """Threads, started when there is work for one more, and one event loop for async handlers.

    Parameters
    ----------
    most : int
        Threads at most, 1 or more.
    """

    def __init__(self, most: int = WORKERS) -> None:
        if check_integer(most, "workers") < 1:
            raise InvalidArgument(f"workers is {most}: give 1 or more", errno=errno.EINVAL)
        self.most = most
        self._lock = threading.Lock()
        self._turns: deque[object] = deque()  # who has jobs that wait; the next one first
        # Not a queue: of those of a task that is gone, tens of thousands, each is taken back.
        self._jobs: dict[object, OrderedDict[Job, None]] = {}
        self._busy: Counter[object] = Counter()
        self._wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._workers = self._waiting = 0
        self._threads: list[threading.Thread] = []
        self._events: AbstractEventLoop | None = None
        self._closed = False

    def submit(self, whose: object, job: Job) -> None:
        """Have a job done by a thread, when it is its owner's turn.

        Raises
        ------
        ClosedError
        AllocationError
            There is no thread, and none can be started (EAGAIN).
        """
        with self._lock:
            self._check_open()
            if self._wakes.qsize() >= self._waiting and self._workers < self.most:
                self._add_worker()
            jobs = self._jobs.get(whose)
            if jobs is None:
                jobs = self._jobs[whose] = OrderedDict()
                self._turns.append(whose)
            jobs[job] = None
        self._wakes.put(True)

    def _add_worker(self) -> None:
        try:
            self._start(self._work, f"memdesc-worker-{self._workers}")
            self._workers += 1
        except AllocationError:
            if not self._workers:  # else those that there are do it
                raise

    def withdraw(self, whose: object, job: Job) -> bool:
        """Take a job back that has not begun; False where it has."""
        with self._lock:
            jobs = self._jobs.get(whose)
            if jobs is None or job not in jobs:
                return False
            del jobs[job]
            if not jobs:
                del self._jobs[whose]
                self._turns.remove(whose)
            return True

    def event_loop(self) -> AbstractEventLoop:
        """Give the loop that runs in a thread of its own; started when first asked for.

        Raises
        ------
        ClosedError
        AllocationError
            No descriptor or thread is left for it (EMFILE, EAGAIN).
        """
        import asyncio

        with self._lock:
            self._check_open()
            if self._events is None:
                try:
                    events = asyncio.new_event_loop()
                except OSError as error:
                    raise no_descriptor("start an event loop for async methods", error) from error
                try:
                    self._start(_run_events, "memdesc-async", events)
                except BaseException:
                    events.close()
                    raise
                self._events = events
            return self._events

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the service was closed")

    def _start(self, target: Callable[..., None], name: str, *arguments: object) -> None:
        thread = threading.Thread(target=target, name=name, args=arguments, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise AllocationError(
                f"no thread can be started for methods: {error}; raise `ulimit -u`",
                errno=errno.EAGAIN,
            ) from error
        self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._waiting += 1
            go_on = self._wakes.get()
            with self._lock:
                self._waiting -= 1
            if not go_on:
                return
            while (found := self._next()) is not None:
                whose, job = found
                try:
                    job()
                except BaseException:
                    log.exception("worker.job_failed")
                finally:
                    self._done(whose)
                del found, whose, job  # a thread that waits keeps nobody alive

    def _next(self) -> tuple[object, Job] | None:
        """Give the job of whose turn it is; None where no one has one that may begin."""
        share = max(1, self.most // 2)
        with self._lock:
            for _ in range(len(self._turns)):
                whose = self._turns.popleft()
                if self._busy[whose] >= share:
                    self._turns.append(whose)
                    continue
                jobs = self._jobs[whose]
                job, _ = jobs.popitem(last=False)
                if jobs:
                    self._turns.append(whose)
                else:
                    del self._jobs[whose]
                self._busy[whose] += 1
                return whose, job
        return None

    def _done(self, whose: object) -> None:
        with self._lock:
            self._busy[whose] -= 1
            if not self._busy[whose]:
                del self._busy[whose]

    def close(self, *, wait: bool = True) -> None:
        """End the threads and the loop; jobs that wait are dropped, async handlers cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._turns.clear()
            self._jobs.clear()
            threads, events = list(self._threads), self._events
        for _ in threads:
            self._wakes.put(False)
        if events is not None:
            import asyncio

            asyncio.run_coroutine_threadsafe(_cancel_all(), events)
        for thread in threads if wait else ():
            if thread is not threading.current_thread():
                thread.join(_JOIN)


def _run_events(events: AbstractEventLoop) -> None:
    import asyncio

    asyncio.set_event_loop(events)
    while True:
        try:
            events.run_forever()
            break
        except BaseException:  # a handler said exit(): it ends no thread of ours
            log.exception("worker.loop_interrupted")
    events.close()


async def _cancel_all() -> None:
    """Cancel what runs in this loop, and stop it when all of that has ended."""
    import asyncio

    events = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await events.shutdown_asyncgens()
    await events.shutdown_default_executor()
    events.call_soon(events.stop)
