"""Connection: a service as its client sees it (the application's side)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import threading
import time
from typing import Any, Self, TypeVar, final

from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import (
    AccessDeniedError,
    ClosedError,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    ServiceNotFoundError,
    ShareNotFoundError,
    TaskGoneError,
    TimedOutError,
)
from memdesc.handover import unpack
from memdesc.mapping import LocalMemoryMap
from memdesc.services import folder, protocol
from memdesc.services.failures import rebuilt
from memdesc.services.peer import Peer
from memdesc.vm.pages import Access
from memdesc.vm.task import Task

_T = TypeVar("_T")
_MOST_SHARES = 1 << 16
"""Entries of a list that are read: a service could go on until this process has no memory left."""


@final
class Connection(Peer):
    """A service as its client sees it; made by `connect`.

    Attributes
    ----------
    task : Task
        The service's process; mappings can be made there (`create_mapping_in_task`).
    name : str
        The service's.

    Notes
    -----
    Threads: safe. Fork: the connection stays the parent's; the child must connect again.
    """

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, mapping_limit: int, allow_copy: bool
    ) -> None:
        super().__init__(sock, task, mapping_limit, allow_copy)
        self.name = name
        self._welcomed = threading.Event()
        self._refused: protocol.Failed | None = None
        self._lengths: dict[str, int] = {}  # of what is watched, as last told
        self._watched: set[str] = set()

    def shares(self, timeout: float | None = 5.0) -> list[protocol.Share]:
        """List what the service shares with this client."""
        found: list[protocol.Share] = []
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            request = protocol.ListShares(self.next_id(), len(found))
            left = None if until is None else max(until - time.monotonic(), 0)
            answer, _ = self.request(request, protocol.Shares, timeout=left)
            found += answer.shares
            if not answer.more or not answer.shares:
                return found
            if len(found) > _MOST_SHARES:
                raise ProtocolError(
                    f"service {self.name!r} lists more than {_MOST_SHARES:,} shares, without end",
                    errno=errno.EPROTO,
                )

    def descriptor(self, name: str, timeout: float | None = 5.0) -> ReceivedMemoryDescriptor:
        """Get a descriptor of what is shared under a name, waiting for it. Owned by the caller.

        Raises
        ------
        ShareNotFoundError
            Nothing was in that time, or not with this client (ENOENT).
        TimedOutError, PeerGoneError, ClosedError
        """
        return self._open(name, timeout)[0]

    def wait_length(self, name: str, known: int, timeout: float | None = None) -> int:
        """Wait until what is shared under a name has another length than `known`; give that.

        The service's buffer was lengthened, grown or shortened (`BufferMemoryDescriptor.grow`,
        `set_length`), or another descriptor is shared under the name. Descriptors and mappings that
        are here already stay as they are; `map` again gives the new length.

        Parameters
        ----------
        name : str
            As the service shares it.
        known : int
            Bytes: the length of the mapping, say, that this program has.
        timeout : float, optional
            Seconds; None waits for ever.

        Returns
        -------
        int
            The latest length that the service has told, in bytes. Those in between are not told.

        Raises
        ------
        TimedOutError, ShareNotFoundError, PeerGoneError, ClosedError
        """
        until = None if timeout is None else time.monotonic() + timeout
        if name not in self._lengths:
            self._watch_length(name, timeout)
        with self._arrived:
            while (nbytes := self._lengths.get(name, known)) == known:
                if self._gone is not None:
                    raise self._gone_again()
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimedOutError(
                        f"{name!r} of service {self.name!r} still had {known:,} bytes after "
                        f"{timeout} s",
                        errno=errno.ETIMEDOUT,
                    )
                self._arrived.wait(left)
            return nbytes

    def _watch_length(self, name: str, timeout: float | None) -> None:
        """Have the service tell of the length of a share, as long as the connection lasts."""
        protocol.check_name(name)
        self._watched.add(name)
        self._ask_about(protocol.WatchLength, name, protocol.Length, timeout)

    def _heard(self, name: str, nbytes: int) -> None:
        """Note the length of what is watched, in the order in which the service told of it."""
        with self._arrived:
            self._lengths[name] = nbytes
            self._arrived.notify_all()

    def map(
        self,
        name: str,
        *,
        offset: int = 0,
        length: int | None = None,
        access: Access | None = None,
        prefault: bool = False,
        guard_pages: int = 0,
        at_address: int | None = None,
        timeout: float | None = 5.0,
    ) -> LocalMemoryMap:
        """Map what is shared under a name into this task, waiting until it is shared.

        Parameters
        ----------
        name : str
            As the service shares it.
        offset, length, access, prefault, guard_pages, at_address
            As of `MemoryDescriptor.create_mapping_in_task`.
        timeout : float, optional
            Seconds to wait for the service to share it and to answer; None waits for ever, 0 asks
            once.

        Returns
        -------
        LocalMemoryMap
            A buffer; `array()` gives it as it was shared. It outlives the connection.

        Raises
        ------
        ShareNotFoundError, MappingError, TimedOutError, PeerGoneError, ClosedError
        """
        descriptor, share = self._open(name, timeout)
        mapping = descriptor.map(
            offset=offset,
            length=length,
            access=access,
            prefault=prefault,
            guard_pages=guard_pages,
            at_address=at_address,
        )
        if share.dtype is not None and mapping.length == descriptor.length:
            mapping.layout = share.shape, share.dtype
        return mapping

    def _open(
        self, name: str, timeout: float | None
    ) -> tuple[ReceivedMemoryDescriptor, protocol.Share]:
        answer, fds = self._ask_about(protocol.OpenShare, name, protocol.Opened, timeout)
        descriptor = unpack(answer.portable, fds)
        share = answer.share
        if (share.nbytes, share.writable) != (descriptor.length, descriptor.max_access.writable):
            descriptor.close()
            raise ProtocolError(
                f"{name!r} is said to have {share.nbytes:,} bytes, writable: {share.writable}; "
                f"what came has {descriptor.length:,}, {descriptor.max_access.value}",
                errno=errno.EPROTO,
            )
        descriptor.name = name
        return descriptor, share

    def _ask_about(
        self,
        question: type[protocol.OpenShare | protocol.WatchLength],
        name: str,
        kind: type[_T],
        timeout: float | None,
    ) -> tuple[_T, list[int]]:
        """Ask until it is shared: a service exists a moment before it shares what it is for."""
        protocol.check_name(name)
        until = None if timeout is None else time.monotonic() + timeout
        pause = 0.002
        while True:
            left = None if until is None else max(until - time.monotonic(), 0.05)
            try:
                return self.request(question(self.next_id(), name), kind, timeout=left)
            except ShareNotFoundError:
                if until is not None and time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Welcome) and not self._welcomed.is_set():
            if message.version != protocol.VERSION:
                raise ProtocolError(f"the service speaks version {message.version}")
            self._welcomed.set()
        elif isinstance(message, protocol.LengthChanged) and message.name in self._watched:
            self._heard(message.name, message.nbytes)
        else:
            super()._handle(message, fds, lost)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        if answer.id == 0 and isinstance(answer, protocol.Failed) and not self._welcomed.is_set():
            self._refused = answer
            self._welcomed.set()
            return
        if isinstance(answer, protocol.Length) and answer.name in self._watched:
            self._heard(answer.name, answer.nbytes)
        elif isinstance(answer, protocol.Opened) and answer.share.name in self._lengths:
            self._heard(answer.share.name, answer.share.nbytes)  # newer than what was told before
        super()._answered(answer, fds, lost)

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        self._welcomed.set()

    def _greet(self, timeout: float | None) -> None:
        self.start()
        with contextlib.suppress(PeerGoneError, ClosedError):
            self.send(protocol.Hello(protocol.VERSION))
        if not self._welcomed.wait(timeout):
            raise TimedOutError(
                f"service {self.name!r} (task {self.task.pid}) took the connection but did not "
                f"answer within {timeout} s",
                errno=errno.ETIMEDOUT,
            )
        if self._refused is not None:
            raise rebuilt(self._refused)
        if self._gone is not None:
            raise self._gone_again()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"task {self.task.pid}"
        return f"<Connection to {self.name!r}: {state}>"


def connect(
    name: str,
    *,
    timeout: float | None = 5.0,
    mapping_limit: int = 4096,
    allow_copy: bool = False,
) -> Connection:
    """Connect to a service, waiting for it to appear.

    Parameters
    ----------
    name : str
        As given to `Service`.
    timeout : float, optional
        Seconds in all to wait for the service to appear and to answer; None waits for ever.
    mapping_limit : int
        How many ranges the service may map into this task at a time; 0 refuses all. A mapping
        is one, or as many as the pieces that it was put together from.
    allow_copy : bool
        Let the service copy this task's memory through the connection (copyin, copyout) where the
        kernel denies it the direct way. It may then read and write any of it.

    Returns
    -------
    Connection
        Ends by `close`, by its ``with`` block, or when it is collected.

    Raises
    ------
    ServiceNotFoundError
        None appeared (ENOENT, ECONNREFUSED).
    AccessDeniedError
        The socket, or the service's rule, does not admit this user (EACCES).
    TimedOutError
        It is there but does not answer.
    PeerGoneError
        It ended, or had no file descriptor left for us, while we greeted it.
    AllocationError
        This process has no file descriptor left (EMFILE).
    """
    until = None if timeout is None else time.monotonic() + timeout
    folder.open_folder(name)
    sock = _reach(name, until, timeout)
    try:
        connection = Connection(name, sock, Task.from_socket(sock), mapping_limit, allow_copy)
    except TaskGoneError as error:
        sock.close()
        raise PeerGoneError(
            f"service {name!r} ended as we connected to it", errno=errno.ECONNRESET
        ) from error
    except BaseException:
        sock.close()
        raise
    try:
        connection._greet(None if until is None else max(until - time.monotonic(), 0.05))
    except BaseException:
        connection.close()
        raise
    return connection


def _reach(name: str, until: float | None, timeout: float | None) -> sockets.socket:
    """Connect a socket, trying again while no one listens."""
    path = folder.socket_path(name)
    pause = 0.002
    while True:
        sock = folder.new_socket()
        try:
            sock.connect(os.fspath(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            if until is not None and time.monotonic() + pause > until:
                if isinstance(error, BlockingIOError):
                    raise TimedOutError(
                        f"service {name!r} took no connection within {timeout} s: its queue of "
                        "those who wait is full (stopped?)",
                        errno=errno.ETIMEDOUT,
                    ) from error
                raise ServiceNotFoundError(
                    f"no service {name!r} appeared within {timeout} s (no one listens at {path}): "
                    "start it, or check the name and MEMDESC_RUNTIME_DIR",
                    errno=error.errno,
                ) from error
        except PermissionError as error:
            sock.close()
            # A service opens its socket to others a moment after it made it (the umask).
            if pause > 0.02:
                raise AccessDeniedError(
                    f"the socket {path} does not admit user {os.geteuid()}: its owner lets others "
                    "in with Service(…, allow=…)",
                    errno=error.errno,
                ) from error
        except BaseException:
            sock.close()
            raise
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
