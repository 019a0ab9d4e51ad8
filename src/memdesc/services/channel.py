"""A channel: one connected socket, its messages, requests and their answers.

Sends come from any thread and never wait; what arrives is handled on the I/O thread; requests wait
in the thread that makes them. A peer that does not read is dropped when too much waits for it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import logging
import os
import selectors
import socket as sockets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from memdesc import errors
from memdesc.errors import (
    ClosedError,
    MappingError,
    MappingReason,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
    describe_errno,
)
from memdesc.handover import close_all, receive_once
from memdesc.services import protocol
from memdesc.services.loop import Loop, loop, tell_if_forked
from memdesc.vm.task import Task

log = logging.getLogger("memdesc.services")

_QUEUE_LIMIT = 4096
"""Messages that may wait for a peer that does not read, before it is dropped."""
_BATCH = 64
"""Messages read from one peer before the others get their turn."""


class _Pending:
    """A request that awaits its answer."""

    __slots__ = ("answer", "done", "fds")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: Any = None
        self.fds: list[int] = []


class Channel:
    """One connected task, and the messages between it and this one.

    Attributes
    ----------
    task : Task
        At the other end, held by pidfd.
    """

    def __init__(self, sock: sockets.socket, task: Task) -> None:
        sock.setblocking(False)
        self.task = task
        self._sock = sock
        self._loop: Loop = loop()
        self._lock = threading.RLock()
        self._gone: MemdescError | None = None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._late: dict[int, Callable[[Any], None]] = {}
        self._finalizer = weakref.finalize(self, _abandon, self._loop, sock, task)
        self._finalizer.atexit = False
        tell_if_forked(self)

    # -- starting and ending ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin to be served by the I/O thread."""
        this = weakref.ref(self)

        def ready(events: int) -> None:
            channel = this()
            if channel is not None:
                channel._ready(events)

        def died(_: int) -> None:
            channel = this()
            if channel is not None:
                channel._end(gone(channel.task))

        def watch() -> None:
            self._loop.watch(self._sock.fileno(), ready)
            self._loop.watch(self.task.fileno(), died)

        self._loop.run(watch)

    @property
    def closed(self) -> bool:
        """Whether it has ended, whoever ended it."""
        return self._gone is not None

    def close(self) -> None:
        """End it. Mappings stay as long as they are held; requests that wait fail. Idempotent."""
        self._loop.run(
            lambda: self._end(
                ClosedError(f"the connection to task {self.task.pid} was closed here")
            )
        )

    def forked(self) -> None:
        """In a fork child: the connection stays the parent's."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._finalizer.detach()
        if self._gone is None:
            self._gone = ClosedError(
                "the connection belongs to the parent of this forked process: connect again here"
            )
            self._sock.close()
            for _, fds in self._queue:
                close_all(fds)
        self._queue.clear()

    def _end(self, why: MemdescError) -> None:
        """Drop everything that hangs on the connection. On the I/O thread, once."""
        with self._lock:
            if self._gone is not None:
                return
            self._gone = why
            waiting = list(self._pending.values())
            self._pending.clear()
            for _, fds in self._queue:
                close_all(fds)
            self._queue.clear()
        self._finalizer.detach()
        self._loop.forget(self._sock.fileno())
        self._loop.forget(self.task.fileno())
        self._sock.close()
        for pending in waiting:
            pending.done.set()
        self._ended(why)
        log.debug("channel.ended", extra={"pid": self.task.pid, "why": str(why)})

    def _ended(self, why: MemdescError) -> None:
        """Called once, on the I/O thread, after the end."""

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        """Take a message that is no answer. Whoever uses the fds empties the list.

        `lost`: descriptors that belong to it did not arrive (this process has none left).
        """
        raise ProtocolError(
            f"{type(message).__name__} is not for this side of the connection",
            errno=errno.EPROTO,
        )

    # -- sending ---------------------------------------------------------------------------------

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send now, or queue; never waits. The descriptors stay the caller's.

        Raises
        ------
        PeerGoneError, ClosedError
        """
        data = protocol.encode(message)
        if len(data) > protocol.MAX_MESSAGE:
            raise errors.InvalidArgument(
                f"a message of {len(data):,} bytes is more than {protocol.MAX_MESSAGE:,}",
                errno=errno.EMSGSIZE,
            )
        with self._lock:
            if self._gone is not None:
                raise self._gone_again()
            if self._queue or not self._try_send(data, fds):
                if len(self._queue) >= _QUEUE_LIMIT:
                    self._loop.post(
                        lambda: self._end(
                            PeerGoneError(
                                f"task {self.task.pid} was dropped: it left {_QUEUE_LIMIT} "
                                "messages unread",
                                errno=errno.ENOBUFS,
                            )
                        )
                    )
                    return
                self._queue.append((data, [os.dup(fd) for fd in fds]))
                self._loop.post(self._write_waiting)

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        ancillary = []
        if fds:
            ancillary = [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, array.array("i", fds))]
        try:
            self._sock.sendmsg([data], ancillary, sockets.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:  # descriptors in flight: wait as for room
                return False
            why = gone(self.task)
            self._loop.post(lambda: self._end(why))
        return True

    def _write_waiting(self) -> None:
        """Send what waits, as far as there is room. On the I/O thread."""
        with self._lock:
            if self._gone is not None:
                return
            while self._queue:
                data, fds = self._queue[0]
                if not self._try_send(data, fds):
                    break
                close_all(fds)
                self._queue.popleft()
            self._loop.want(self._sock.fileno(), write=bool(self._queue))

    def request(
        self,
        message: Any,
        fds: Sequence[int] = (),
        timeout: float | None = 5.0,
        undo: Callable[[Any], None] | None = None,
    ) -> tuple[Any, list[int]]:
        """Send what has an `id`, and wait for its answer: (answer, its descriptors).

        `undo` is called with an answer that comes when no one waits for it any more.

        Raises
        ------
        TimedOutError, PeerGoneError, ClosedError
        MemdescError
            What the other side answered instead.
        """
        if self._loop.here:
            raise MemdescError(
                "a request on the I/O thread would wait for itself: make it on another thread"
            )
        pending = _Pending()
        with self._lock:
            self._pending[message.id] = pending
        try:
            self.send(message, fds)
            answered = pending.done.wait(timeout)
        except BaseException:
            self._give_up(message.id, pending, undo)
            raise
        if not answered:
            self._give_up(message.id, pending, undo)
            if pending.answer is None:
                raise TimedOutError(
                    f"task {self.task.pid} did not answer {type(message).__name__} within "
                    f"{timeout} s (stopped, or busy holding the interpreter lock?)",
                    errno=errno.ETIMEDOUT,
                )
        if pending.answer is None:
            raise self._gone_again()
        if isinstance(pending.answer, protocol.Failed):
            close_all(pending.fds)
            raise rebuilt(pending.answer)
        return pending.answer, pending.fds

    def _give_up(self, number: int, pending: _Pending, undo: Callable[[Any], None] | None) -> None:
        with self._lock:
            waiting = self._pending.pop(number, None) is not None
            if waiting and self._gone is None:
                self._late[number] = undo or _ignore

    def next_id(self) -> int:
        """Give a number that no other request of this side has."""
        return next(self._ids)

    def _gone_again(self) -> MemdescError:
        """Give a fresh copy of what ended it, for each caller that asks."""
        why = self._gone
        assert why is not None
        return type(why)(why.message, errno=why.errno)

    # -- receiving, on the I/O thread ------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._write_waiting()
        for _ in range(_BATCH):
            if self._gone is not None:
                return
            try:
                data, fds, lost = receive_once(self._sock, protocol.MAX_MESSAGE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._end(gone(self.task))
                return
            if not data:
                close_all(fds)
                self._end(gone(self.task))
                return
            self._receive(data, fds, lost)

    def _receive(self, data: bytes, fds: list[int], lost: bool) -> None:
        try:
            self._dispatch(protocol.decode(data), fds, lost)
        except (msgspec.MsgspecError, ProtocolError) as error:
            log.warning("channel.protocol_error", extra={"pid": self.task.pid, "why": str(error)})
            self._end(
                ProtocolError(
                    f"task {self.task.pid} sent what is not of the protocol: {error}",
                    errno=errno.EPROTO,
                )
            )
        finally:
            close_all(fds)  # whoever used them emptied the list

    def _dispatch(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Answer):
            self._answered(message, fds, lost)
        else:
            self._handle(message, fds, lost)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        with self._lock:
            pending = self._pending.pop(answer.id, None)
            undo = self._late.pop(answer.id, None)
        if pending is not None:
            if lost:
                answer = protocol.Failed(
                    answer.id,
                    "MappingError",
                    "descriptors sent with the answer did not arrive: this process has none left "
                    "(raise `ulimit -n`)",
                    errno.EMFILE,
                    MappingReason.TOO_MANY_FILES.name,
                )
            pending.fds = list(fds)
            fds.clear()
            pending.answer = answer
            pending.done.set()
        elif undo is not None:
            undo(answer)
        else:
            raise ProtocolError(f"an answer to {answer.id}, which was not asked")

    def _answer(self, number: int, work: Callable[[], tuple[Any, list[int]]]) -> None:
        """Do what was asked; send the answer and its descriptors, or what went wrong.

        Never our stack: the errors of the family travel as what they are.
        """
        fds: list[int] = []
        try:
            answer, fds = work()
        except ProtocolError:
            raise
        except MemdescError as error:
            reason = getattr(error, "reason", None)
            answer = protocol.Failed(
                number,
                type(error).__name__,
                error.message[:4096],
                error.errno,
                reason.name if reason is not None else None,
            )
        except BufferError as error:
            answer = protocol.Failed(number, "BufferError", str(error)[:4096])
        except OSError as error:
            text = f"task {os.getpid()}: {describe_errno(error)}"
            answer = protocol.Failed(number, "MemdescError", text, error.errno)
        try:
            with contextlib.suppress(PeerGoneError, ClosedError):
                self.send(answer, fds)
        finally:
            close_all(fds)


def gone(task: Task) -> PeerGoneError:
    return PeerGoneError(
        f"task {task.pid} has gone, or ended the connection", errno=errno.ECONNRESET
    )


def rebuilt(failed: protocol.Failed) -> BaseException:
    """Make an exception of what a peer says failed; only classes of the family come through."""
    if failed.error == "BufferError":
        return BufferError(failed.message)
    kind = getattr(errors, failed.error, None) if failed.error in errors.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, MemdescError)):
        return ProtocolError(f"the peer answered {failed.error}: {failed.message}")
    if issubclass(kind, MappingError):
        known = failed.reason in MappingReason.__members__
        reason = MappingReason[failed.reason] if known else MappingReason.REFUSED  # type: ignore[misc]
        return kind(failed.message, reason=reason, errno=failed.errno)
    if issubclass(kind, errors.WiringError):
        return ProtocolError(f"the peer answered {failed.error}: {failed.message}")
    return kind(failed.message, errno=failed.errno)


def _ignore(_: Any) -> None:
    """What undoes an answer that changed nothing."""


def _abandon(io: Loop, sock: sockets.socket, task: Task) -> None:
    """Close the socket of a connection that was dropped without close()."""

    def close() -> None:
        io.forget(sock.fileno())
        io.forget(task.fileno())
        sock.close()

    io.post(close)
