"""A channel: one connected socket and its messages.

Sends come from any thread and never wait; what arrives is handled on the I/O thread. A peer that
asks and does not read the answers is dropped when too much waits for it.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import selectors
import socket as sockets
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from memdesc import errors
from memdesc.errors import (
    AccessDeniedError,
    ClosedError,
    MappingError,
    MemdescError,
    PeerGoneError,
    ProtocolError,
)
from memdesc.handover import close_all, discard, receive_once, too_many_files
from memdesc.loop import Loop, loop, tell_if_forked
from memdesc.memory.closing import close_socket, no_descriptor
from memdesc.services import protocol
from memdesc.services.failures import failed
from memdesc.vm import tracing
from memdesc.vm.forks import Condition
from memdesc.vm.task import Task
from memdesc.vm.telling import bare

log = logging.getLogger("memdesc.services")

QUEUE_LIMIT = 1024
"""Messages that may wait for a peer that does not read, besides those in the socket."""
_QUEUE_FDS = 64
"""Descriptors that may wait with them: they are this process's own meanwhile."""
_BATCH = 64
"""Messages read from one peer before the others get their turn."""


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
        # Our own: the program may close its Task, and epoll would then watch nobody.
        self._life = _Life(sock, task)
        self._lock = Condition()
        self._gone: MemdescError | None = None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued_fds = 0
        self._finalizer = weakref.finalize(self, _abandon, self._loop, self._life)
        self._finalizer.atexit = False
        tell_if_forked(self)
        if tracing.books is not None:
            tracing.books.note(self, _told)

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
                channel._end_after_reading()

        def watch() -> None:
            self._loop.watch(self._life.sock.fileno(), ready)
            try:
                self._loop.watch(self._life.pidfd, died)
            except BaseException:  # its number will be another's, who could not be watched then
                self._loop.forget(self._life.sock.fileno())
                raise

        self._loop.run(watch)

    @property
    def closed(self) -> bool:
        """Whether it has ended, whoever ended it."""
        return self._gone is not None

    def close(self) -> None:
        """End it. Mappings stay as long as they are held; requests that wait fail. Idempotent."""
        if self.closed:
            return  # in a fork child always: the loop that we know is the parent's
        self._loop.run(
            lambda: self._end(
                ClosedError(
                    f"the connection to task {self.task.pid} was closed here, by close() or the "
                    "end of its with block: connect again; what was mapped over it stays"
                )
            )
        )

    def forked(self) -> None:
        """In a fork child: the connection stays the parent's."""
        self._lock = Condition()  # another thread of the parent may have held it
        self._finalizer.detach()
        if self._gone is None:
            self._gone = ClosedError(
                "the connection belongs to the parent of this forked process: connect again here"
            )
            self._life.close()
            self._clear_queue()

    def _end(self, why: MemdescError) -> None:
        """Drop everything that hangs on the connection. On the I/O thread, once."""
        with self._lock:
            if self._gone is not None:
                return
            self._gone = why
            self._clear_queue()
        self._finalizer.detach()
        self._life.end(self._loop)
        self._ended(why)
        log.debug("channel.ended", extra={"pid": self.task.pid, "why": str(why)})

    def _end_after_reading(self) -> None:
        """End for a peer that has gone, after what it said before. On the I/O thread."""
        self._ready(selectors.EVENT_READ)
        self._end(self._peer_gone())

    def _peer_gone(self) -> PeerGoneError:
        """What a connection ends with that the peer has ended."""
        return gone(self.task)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a connection belongs to this process: connect(…) in the other one")

    def _clear_queue(self) -> None:
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self._queued_fds = 0

    def _ended(self, why: MemdescError) -> None:
        """Called once, on the I/O thread, after the end."""

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        """Take a message. Whoever uses the fds empties the list. Overridden by what takes more.

        `lost`: descriptors that belong to it did not arrive (this process has none left).
        """
        raise ProtocolError(
            f"{type(message).__name__} is not for this side of the connection",
            errno=errno.EPROTO,
        )

    # -- sending ---------------------------------------------------------------------------------

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send now, or queue; never waits. The descriptors stay the caller's.

        A peer that leaves too much unread is dropped.

        Raises
        ------
        PeerGoneError, ClosedError
        MappingError
            TOO_MANY_FILES: the descriptors can not be sent (EMFILE, ETOOMANYREFS).
        """
        if not self._put(message, fds):
            self._drop(f"it left {len(self._queue):,} messages unread")

    def _drop(self, why: str) -> None:
        """End the connection for what the peer does, from any thread."""
        error = PeerGoneError(f"task {self.task.pid} was dropped: {why}", errno=errno.ENOBUFS)
        self._loop.post(lambda: self._end(error))

    def _put(self, message: Any, fds: Sequence[int]) -> bool:
        """Send or queue; False where too much waits already."""
        data = protocol.encode(message)
        if len(data) > protocol.MAX_MESSAGE:
            raise errors.InvalidArgument(
                f"a message of {len(data):,} bytes is more than {protocol.MAX_MESSAGE:,}",
                errno=errno.EMSGSIZE,
            )
        with self._lock:
            if self._gone is not None:
                raise self._gone_again()
            if not self._queue and self._try_send(data, fds):
                return True
            if len(self._queue) >= QUEUE_LIMIT or (
                self._queue and self._queued_fds + len(fds) > _QUEUE_FDS
            ):
                return False
            waiting = duplicates(fds)
            if waiting and not self._may_keep(max(waiting)):
                close_all(waiting)
                return False
            self._queue.append((data, waiting))
            self._queued_fds += len(fds)
            self._loop.post(self._write_waiting)
            return True

    def _may_keep(self, fd: int) -> bool:
        """Whether a descriptor of that number may wait for the peer to read."""
        return True

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send, or say that there is no room."""
        ancillary = []
        if fds:
            ancillary = [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, array.array("i", fds))]
        try:
            self._sock.sendmsg([data], ancillary, sockets.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise too_many_files(error) from error
            self._loop.post(self._end_after_reading)
        return True

    def _write_waiting(self) -> None:
        """Send what waits, as far as there is room. On the I/O thread."""
        with self._lock:
            if self._gone is not None:
                return
            while self._queue:
                data, fds = self._queue[0]
                try:
                    if not self._try_send(data, fds):
                        break
                except MappingError as error:  # those in flight are this very peer's
                    self._drop(str(error))
                    return
                close_all(fds)
                self._queued_fds -= len(fds)
                self._queue.popleft()
            self._loop.want(self._sock.fileno(), write=bool(self._queue))

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
            except AccessDeniedError as refusal:  # its user holds up too many closings
                log.warning("channel.held_up", extra={"pid": self.task.pid, "why": str(refusal)})
                self._send_if_there(failed(0, refusal))
                self._end(bare(refusal))
                return
            except OSError:
                self._end(self._peer_gone())
                return
            if not data:
                discard(fds, self.task.credentials.uid)
                self._end(self._peer_gone())
                return
            self._receive(data, fds, lost)

    def _receive(self, data: bytes, fds: list[int], lost: bool) -> None:
        try:
            self._handle(protocol.read(data), fds, lost)
        except ProtocolError as error:
            log.warning("channel.protocol_error", extra={"pid": self.task.pid, "why": str(error)})
            self._end(
                ProtocolError(
                    f"task {self.task.pid} sent what is not of the protocol: {error}",
                    errno=errno.EPROTO,
                )
            )
        finally:
            discard(fds, self.task.credentials.uid)  # whoever used them emptied the list

    def _send_if_there(self, answer: Any, fds: Sequence[int] = ()) -> None:
        try:
            self.send(answer, fds)
        except MemdescError:
            if self._gone is None:
                raise


def _told(channel: Channel) -> tracing.Told:
    return None if channel.closed else (getattr(channel, "name", f"task {channel.task.pid}"), 0)


class _Life:
    """The descriptors of a connection: its socket, and a pidfd of the task at the other end."""

    def __init__(self, sock: sockets.socket, task: Task) -> None:
        self.sock = sock
        try:
            self.pidfd = os.dup(task.fileno())
        except OSError as error:
            raise no_descriptor(f"watch task {task.pid}", error) from error

    def end(self, io: Loop) -> None:
        """End the connection. On the I/O thread."""
        io.forget(self.sock.fileno())
        io.forget(self.pidfd)
        close_socket(self.sock)
        self.close()

    def close(self) -> None:
        """Let go of the descriptors, without a word to the peer."""
        self.sock.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def duplicates(fds: Sequence[int]) -> list[int]:
    """Duplicate descriptors, all or none; `MappingError` TOO_MANY_FILES."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError as error:
        close_all(made)
        raise too_many_files(error) from error
    return made


def gone(task: Task) -> PeerGoneError:
    return PeerGoneError(
        f"task {task.pid} has gone, or ended the connection", errno=errno.ECONNRESET
    )


def _abandon(io: Loop, life: _Life) -> None:
    """Close the descriptors of a connection that was dropped without close()."""
    io.post(lambda: life.end(io))
