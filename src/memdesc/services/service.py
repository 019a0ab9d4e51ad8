"""Service: a process that owns memory and rules who sees it (the driver's side)."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MemdescError,
    PeerGoneError,
    SealedError,
    ShareNotFoundError,
    TimedOutError,
)
from memdesc.services import folder, protocol
from memdesc.services.loop import Loop, loop, tell_if_forked
from memdesc.services.user_client import UserClient
from memdesc.vm.pages import Access
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy.typing as npt

log = logging.getLogger("memdesc.services")

Allow = Callable[[Task], bool]

_STRANGERS = 128
"""Clients that may be connected without having greeted; one more, and the oldest goes."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """One thing that a service shares, and with whom."""

    name: str
    descriptor: MemoryDescriptor
    access: Access
    enforced: bool
    shape: tuple[int, ...] | None
    dtype: str | None
    allow: Allow | None

    def described(self) -> protocol.Share:
        """As clients are told of it."""
        return protocol.Share(
            self.name, self.descriptor.length, self.access.writable, self.shape, self.dtype
        )


@final
class Service:
    """Shares descriptors under names with the processes that connect (the driver's side).

    Parameters
    ----------
    name : str
        A name, or a path with a slash; see `memdesc.services.folder`.
    allow : callable, optional
        Takes the client's `Task` (its `credentials` are the kernel's word), says whether it is
        admitted. By default: the same user. Called on the I/O thread; must not wait.
    mapping_limit : int
        How many ranges one client may map into this task at a time; 0 refuses all. A mapping
        is one, or as many as the pieces that it was put together from.

    Raises
    ------
    NameInUseError
        A living service has the name (EADDRINUSE).
    AccessDeniedError
        The runtime folder is not this user's alone (EACCES).

    Notes
    -----
    Linux: a Unix seqpacket socket with mode 0600 (0666 with `allow`), SO_PEERCRED, SO_PEERPIDFD.
    A killed service leaves its socket file, which the next to open the folder sweeps. Clients keep
    what they have mapped.

    Threads: safe. Fork: the service stays the parent's; in the child it is closed.

    Examples
    --------
    >>> import memdesc as md
    >>> with md.Service("camera") as camera:
    ...     camera.share("frames", md.BufferMemoryDescriptor(100))
    ...     with md.connect("camera") as client:
    ...         len(client.map("frames"))
    100
    """

    def __init__(self, name: str, *, allow: Allow | None = None, mapping_limit: int = 64) -> None:
        self.name = name
        self.mapping_limit = mapping_limit
        self._allow = allow
        self._lock = threading.RLock()
        self._joining = threading.Condition(self._lock)
        self._shares: dict[str, _Shared] = {}
        self._clients: list[UserClient] = []
        self._unseen: list[UserClient] = []
        self._strangers: dict[UserClient, None] = {}  # that have not greeted; oldest first
        self._closed = self._telling = False
        self._loop = loop()
        self._listener = folder.Listener(name, for_all=allow is not None)
        self.path = self._listener.path
        self._finalizer = weakref.finalize(self, _abandon, self._loop, self._listener)
        tell_if_forked(self)
        this = weakref.ref(self)

        def ready(_: int) -> None:
            service = this()
            if service is not None:
                service._accept()

        self._loop.run(lambda: self._loop.watch(self._listener.sock.fileno(), ready))

    # -- sharing ---------------------------------------------------------------------------------

    def share(
        self,
        name: str,
        descriptor: MemoryDescriptor,
        *,
        access: Access | None = None,
        enforced: bool = True,
        shape: tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        allow: Allow | None = None,
    ) -> None:
        """Let clients find a descriptor under a name. Replaces what was shared under it.

        Parameters
        ----------
        name : str
            At most 1,024 characters.
        descriptor : MemoryDescriptor
            Kept alive while shared; sealed at the first client's opening.
        access : Access, optional
            What clients get; by default the most that `max_access` allows.
        enforced : bool
            False accepts read-only as a courtesy on memory that is READ_WRITE.
        shape, dtype : optional
            How `mapping.array()` looks at the other side. With `dtype` alone it is flat, and as
            long as the descriptor then is; a `shape` stays as it is when that grows.
        allow : callable, optional
            Further rule for this share: takes the client's Task.

        Raises
        ------
        SealedError
            READ_WRITE memory can not be shared read-only and enforced; nor the other way round.
        RangeError, InvalidArgument
            The array does not fit, or can not travel.
        """
        protocol.check_name(name)
        check_descriptor(descriptor, "what is shared")
        access = descriptor.max_access if access is None else Access(access)
        if not access.within(descriptor.max_access):
            raise SealedError(
                f"{descriptor.name!r} gives {descriptor.max_access.value} at most: make it with "
                "max_access=READ_WRITE to share it for writing",
                errno=errno.EACCES,
            )
        if enforced and access is Access.READ_ONLY and descriptor.max_access.writable:
            raise SealedError(
                f"{descriptor.name!r} is max_access=READ_WRITE: a client that it is shared with "
                "read-only could re-open it for writing; make it READ_ONLY, or say "
                "enforced=False if a courtesy is enough",
                errno=errno.EACCES,
            )
        shape, kind = _check_layout(descriptor, shape, dtype)
        shared = _Shared(name, descriptor, access, enforced, shape, kind, allow)
        with self._lock:
            self._check_open()
            self._shares[name] = shared
        if isinstance(descriptor, BufferMemoryDescriptor):
            descriptor.watch_length(self)
        self.length_changed()  # of what was shared under the name before

    def unshare(self, name: str) -> None:
        """Share it no longer; clients keep what they have mapped."""
        with self._lock:
            self._check_open()
            if self._shares.pop(name, None) is None:
                raise ShareNotFoundError(
                    f"service {self.name!r} shares no {name!r}", errno=errno.ENOENT
                )

    def shares(self) -> list[protocol.Share]:
        """List what is shared."""
        with self._lock:
            return [shared.described() for shared in self._shares.values()]

    def length_changed(self) -> None:
        """Have clients that wait for it told of a length that changed; called by buffers."""
        if not self._closed and not self._telling:
            self._telling = True
            self._loop.post(self._tell_lengths)

    # -- clients ---------------------------------------------------------------------------------

    def clients(self) -> list[UserClient]:
        """List the clients that are connected and alive."""
        with self._lock:
            return list(self._clients)

    def wait_client(self, timeout: float | None = None) -> UserClient:
        """Wait for the next client that is admitted.

        Raises
        ------
        TimedOutError, ClosedError
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._joining:
            while not self._unseen:
                self._check_open()
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimedOutError(
                        f"no client connected to service {self.name!r} within {timeout} s",
                        errno=errno.ETIMEDOUT,
                    )
                self._joining.wait(left)
            return self._unseen.pop(0)

    def admits(self, task: Task) -> bool:
        """Whether the rule lets a task in; a rule that raises admits nobody."""
        if self._allow is None:
            return task.credentials.uid == os.geteuid()
        try:
            return bool(self._allow(task))
        except BaseException:
            log.exception("service.rule_failed", extra={"service": self.name})
            return False

    # -- on the I/O thread -----------------------------------------------------------------------

    def _accept(self) -> None:
        if self._closed:
            return
        try:
            sock, _ = self._listener.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.warning("service.no_descriptors", extra={"service": self.name})
            self._listener.turn_away()
            return
        try:
            client = UserClient(self, sock, Task.from_socket(sock), self.mapping_limit)
            client.start()
        except (MemdescError, OSError) as error:  # it has gone already, or we have no descriptor
            log.debug("service.client_lost", extra={"service": self.name, "why": str(error)})
            sock.close()
            return
        with self._lock:
            self._strangers[client] = None
            oldest = next(iter(self._strangers)) if len(self._strangers) > _STRANGERS else None
        if oldest is not None:
            oldest._end(
                PeerGoneError(
                    f"task {oldest.task.pid} was dropped: it did not greet while {_STRANGERS} "
                    "others came",
                    errno=errno.ECONNABORTED,
                )
            )

    def _joined(self, client: UserClient) -> None:
        with self._joining:
            self._strangers.pop(client, None)
            self._clients.append(client)
            self._unseen.append(client)
            self._joining.notify_all()

    def _left(self, client: UserClient) -> None:
        with self._joining:
            self._strangers.pop(client, None)
            for books in (self._clients, self._unseen):
                if client in books:
                    books.remove(client)

    def _tell_lengths(self) -> None:
        self._telling = False  # first: what changes from here on is told the next time
        for client in self.clients():
            client.tell_lengths()

    def _visible_to(self, client: UserClient) -> list[protocol.Share]:
        with self._lock:
            known = list(self._shares.values())
        return [one.described() for one in known if _allows(one, client)]

    def _find(self, client: UserClient, name: str) -> _Shared:
        with self._lock:
            shared = self._shares.get(name)
        if shared is None or not _allows(shared, client):
            raise ShareNotFoundError(
                f"service {self.name!r} shares no {name[:80]!r} with task {client.task.pid}: see "
                "shares()",
                errno=errno.ENOENT,
            )
        return shared

    # -- lifetime --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(
                f"service {self.name!r} was closed, or belongs to the parent of this forked "
                "process: make a new Service here"
            )

    def close(self) -> None:
        """End the service: give up the name and end every connection. Again is a no-op."""
        with self._joining:
            if self._closed:
                return
            self._closed = True
            self._shares.clear()
            self._joining.notify_all()
        self._finalizer.detach()
        try:
            self._listener.remove_name()
        finally:
            self._loop.run(lambda: self._listener.end(self._loop))
            with self._lock:  # now nobody comes any more
                clients = [*self._clients, *self._strangers]
            for client in clients:
                client.close()

    def forked(self) -> None:
        """In a fork child: the service stays the parent's."""
        self._lock = threading.RLock()
        self._joining = threading.Condition(self._lock)
        self._finalizer.detach()
        if not self._closed:
            self._closed = True
            self._listener.close()
        self._clients.clear()
        self._unseen.clear()
        self._strangers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clients)} clients"
        return f"<Service {self.name!r}: {len(self._shares)} shares, {state}>"


def _allows(shared: _Shared, client: UserClient) -> bool:
    if shared.allow is None:
        return True
    try:
        return bool(shared.allow(client.task))
    except BaseException:
        log.exception("service.rule_failed", extra={"share": shared.name})
        return False


def _check_layout(
    descriptor: MemoryDescriptor, shape: tuple[int, ...] | None, dtype: Any
) -> tuple[tuple[int, ...] | None, str | None]:
    """Check that an array of that form fits and can travel: (shape, array-protocol string)."""
    if shape is None and dtype is None:
        return None, None
    import numpy as np

    kind = np.dtype("u1" if dtype is None else dtype)
    if kind.hasobject or kind.names:
        raise InvalidArgument(
            f"dtype {kind} can not travel: share it as bytes and give the dtype to array()"
        )
    view = descriptor.array(shape, kind)
    return None if shape is None else view.shape, kind.str


def _abandon(io: Loop, listener: folder.Listener) -> None:
    """Give up the name and the descriptors of a service that was dropped without close()."""
    try:
        listener.remove_name()
    finally:
        io.post(lambda: listener.end(io))
