"""Requests over a channel, and the answers to them, both ways.

Requests wait in the thread that makes them; one to a peer that does not read fails at once.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket as sockets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from memdesc.errors import (
    LimitError,
    MemdescError,
    ProtocolError,
    TimedOutError,
    describe_errno,
)
from memdesc.handover import close_all, discard, too_many_files
from memdesc.services import protocol
from memdesc.services.channel import QUEUE_LIMIT, Channel
from memdesc.services.failures import failed, rebuilt
from memdesc.vm import tracing
from memdesc.vm.awaiting import Alarm, time_limit
from memdesc.vm.task import Task
from memdesc.vm.timeouts import check_timeout

_T = TypeVar("_T")

_LATE_LIMIT = 16 * QUEUE_LIMIT
"""Requests that a peer may leave unanswered for good, before it is dropped."""


SILENT = (
    "(stopped, or busy holding the interpreter lock? Or it takes longer: give a longer timeout=)"
)
"""What can be the matter with a task that does not answer."""


class Pending(Protocol):
    """A request that awaits its answer: None where none comes, as the connection ended."""

    answer: Any
    fds: list[int]

    def wake(self) -> None:
        """Tell who waits. On the I/O thread, once, after the answer was set."""


class _Waiting:
    """One that a thread waits for."""

    __slots__ = ("_done", "answer", "fds")

    def __init__(self) -> None:
        self._done = threading.Lock()  # a tenth of what an Event costs
        self._done.acquire()
        self.answer: Any = None
        self.fds: list[int] = []

    def wake(self) -> None:
        self._done.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is done; False where it is not in that time."""
        most = threading.TIMEOUT_MAX
        return self._done.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), most))


class _Awaited(Alarm):
    """One that a task of an event loop waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Any = None
        self.fds: list[int] = []

    def wake(self) -> None:
        self.release()


class Requester(Channel):
    """A channel over which either side may ask the other."""

    def __init__(self, sock: sockets.socket, task: Task) -> None:
        super().__init__(sock, task)
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._late: dict[int, Callable[[Any], None]] = {}

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            waiting = list(self._pending.values())
            self._pending.clear()
            self._late.clear()
        for pending in waiting:
            pending.wake()

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Answer):
            self._answered(message, fds, lost)
        else:
            super()._handle(message, fds, lost)

    def request(
        self,
        message: Any,
        kind: type[_T],
        fds: Sequence[int] = (),
        timeout: float | None = 5.0,
        undo: Callable[[Any], None] | None = None,
    ) -> tuple[_T, list[int]]:
        """Send what has an `id`, and wait for its answer of that kind: (answer, its descriptors).

        `undo` is called with an answer that comes when no one waits for it any more.

        Raises
        ------
        TimedOutError
            No answer came in time (ETIMEDOUT); or too many messages wait for the peer as it is,
            and nothing was sent (ENOBUFS).
        PeerGoneError, ClosedError
        ProtocolError
            It answered what is no answer to this; the connection was ended.
        MemdescError
            What the other side answered instead.
        """
        check_timeout(timeout)
        if self._loop.here:
            raise MemdescError(
                "a request on the I/O thread would wait for itself: make it on another thread"
            )
        pending = _Waiting()
        self._expect(message.id, pending)
        try:
            self._ask(message, fds)
            if not pending.wait(timeout) and self._give_up(message.id, undo):
                raise self._silent(_name(message), timeout)
        except BaseException:
            self._abandon(message.id, pending, undo)
            raise
        return self._checked(pending, kind)

    async def request_async(
        self,
        message: Any,
        kind: type[_T],
        fds: Sequence[int] = (),
        timeout: float | None = 5.0,
        undo: Callable[[Any], None] | None = None,
    ) -> tuple[_T, list[int]]:
        """As `request`, for asyncio. Cancelled, `undo` is called with the answer."""
        pending = _Awaited()
        self._expect(message.id, pending)
        try:
            self._ask(message, fds)
            async with time_limit(timeout, lambda: self._silent(_name(message), timeout)):
                await pending.wait()
        except BaseException:
            self._abandon(message.id, pending, undo)
            raise
        return self._checked(pending, kind)

    def _silent(self, what: str, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"task {self.task.pid} did not answer {what} within {timeout} s {SILENT}",
            errno=errno.ETIMEDOUT,
        )

    def _abandon(self, number: int, pending: Pending, undo: Callable[[Any], None] | None) -> None:
        """See to the answer to which nobody looks any more, here already or not."""
        self._give_up(number, undo)
        if pending.answer is not None:
            discard(pending.fds, self.task.credentials.uid)
            (undo or _ignore)(pending.answer)

    def _expect(self, number: int, pending: Pending) -> None:
        """Have an answer of that number given to `pending`."""
        with self._lock:
            self._pending[number] = pending

    def _ask(self, message: Any, fds: Sequence[int]) -> None:
        try:
            queued = self._put(message, fds)
        except MemdescError:
            self._forget(message.id)
            raise
        if not queued:
            self._forget(message.id)
            raise TimedOutError(
                f"task {self.task.pid} does not read: {len(self._queue):,} messages wait for "
                f"it, so {_name(message)} was not sent (stopped?)",
                errno=errno.ENOBUFS,
            )

    def _forget(self, number: int) -> None:
        """Await no answer: nothing was sent."""
        with self._lock:
            self._pending.pop(number, None)

    def _checked(self, pending: Pending, kind: type[_T]) -> tuple[_T, list[int]]:
        answer, fds = pending.answer, pending.fds
        if answer is None:
            raise self._gone_again()
        if isinstance(answer, kind):
            return answer, fds
        discard(fds, self.task.credentials.uid)
        if isinstance(answer, protocol.Failed):
            raise _refusal(answer)
        why = f"task {self.task.pid} answered {type(answer).__name__}, not {kind.__name__}"
        # Another than is raised: the connection keeps it.
        self._loop.post(partial(self._end, ProtocolError(why, errno=errno.EPROTO)))
        raise ProtocolError(why, errno=errno.EPROTO)

    def _give_up(self, number: int, undo: Callable[[Any], None] | None) -> bool:
        """Wait no longer for an answer; False if it came, or the connection ended, meanwhile."""
        with self._lock:
            if number not in self._pending:
                return False
            self._late[number] = undo or _ignore  # first: an interrupt may come between
            del self._pending[number]
            if len(self._late) > _LATE_LIMIT:
                self._drop(f"it answered none of {_LATE_LIMIT:,} requests")
            return True

    def next_id(self) -> int:
        """Give a number that no other request of this side has."""
        return next(self._ids)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        with self._lock:
            pending = self._pending.pop(answer.id, None)
            undo = self._late.pop(answer.id, None)
            if pending is not None:
                if lost:
                    answer = failed(answer.id, too_many_files(None))
                elif isinstance(answer, protocol.WITH_DESCRIPTORS):
                    pending.fds = list(fds)
                    fds.clear()
                pending.answer = answer
        if pending is not None:
            pending.wake()
            return
        if undo is None:
            raise ProtocolError(f"an answer to {answer.id}, which was not asked")
        undo(answer)

    def _answer(self, number: int, work: Callable[[], tuple[Any, list[int]]]) -> None:
        """Do what was asked; send the answer and its descriptors, or what went wrong.

        Never our stack: the errors of the family travel as what they are.
        """
        fds: list[int] = []
        try:
            answer, fds = work()
            self._send_if_there(answer, fds)
        except ProtocolError:
            raise
        except (MemdescError, BufferError) as error:
            self._send_if_there(failed(number, error))
        except OSError as error:
            text = f"task {os.getpid()}: {describe_errno(error)}"
            self._send_if_there(failed(number, MemdescError(text, errno=error.errno)))
        except Exception:
            text = f"task {os.getpid()} failed to answer: its log has the reason"
            self._send_if_there(failed(number, MemdescError(text)))
            raise  # to the loop, which logs it
        finally:
            close_all(fds)


def _ignore(_: Any) -> None:
    """What undoes an answer that changed nothing."""


def _refusal(answer: protocol.Failed) -> BaseException:
    error = rebuilt(answer)
    if isinstance(error, LimitError):
        tracing.blamed(error, of=("Subscription", "Connection"))
    return error


def _name(message: Any) -> str:
    """Name a question in words for people: a call by its method."""
    return f"{message.method}()" if isinstance(message, protocol.Call) else type(message).__name__
