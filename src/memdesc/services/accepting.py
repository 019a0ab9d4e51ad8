"""Accepting: a service's name, who connects to it, and its end."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket as sockets
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, Self, cast

from memdesc.copyio import Route, route
from memdesc.errors import (
    AccessDeniedError,
    ClosedError,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
)
from memdesc.loop import Loop, loop, tell_if_forked
from memdesc.memory.closing import close_socket
from memdesc.services import folder, protocol
from memdesc.services.failures import failed
from memdesc.services.limits import Limits, check_limits
from memdesc.services.logs import log
from memdesc.services.offers import Allow, Offers
from memdesc.services.peer import Peer
from memdesc.services.rate import Bucket
from memdesc.vm import tracing
from memdesc.vm.forks import Condition
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from memdesc.services.service import Service
    from memdesc.services.user_client import UserClient

STRANGERS = 128
"""Clients that may be connected without having greeted; one more, and the oldest goes."""
BURST = 128
"""Connections that are taken at once, whatever the rate."""
RESERVE = 128
"""Descriptors (at most a quarter of all) that no new client gets, and none waits in for a client to
read: they serve those who are in."""
_PAUSE = 0.01
"""Seconds at least that connections wait when they come too fast: so several are taken at a time,
and not one with every turn of the I/O thread."""


class Accepting:
    """Base of `Service`: takes clients in, and knows them. Each capability builds on it.

    A capability that must know of the end overrides `_ending`; of a fork, `forked`.
    """

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self.name = name
        self.limits = check_limits(limits)
        self._allow = allow
        self._lock = self._joining = Condition()
        self._clients: list[Accepted] = []
        self._of_task: Counter[Task] = Counter()
        self._unseen: list[Accepted] = []
        self._strangers: dict[Accepted, None] = {}  # that have not greeted; oldest first
        self._watcher: Callable[[UserClient, bool], object] | None = None
        self._closed = False
        rate = self.limits.connections_per_second
        self._rate = None if rate is None else Bucket(rate, BURST)
        self._loop = loop()
        self._stopped = False  # somebody else may be about to take the clients in
        self._listener = self._open_listener(for_all=allow is not None)
        self._finalizer = weakref.finalize(self, _abandon, self._loop, self._listener)
        tell_if_forked(self)
        if tracing.books is not None:
            tracing.books.note(self, _told)

    def _open_listener(self, *, for_all: bool) -> folder.Listener:
        return folder.Listener(self.name, for_all=for_all)

    @property
    def path(self) -> Path:
        """The socket's."""
        from pathlib import Path  # whose imports take a megabyte, and few ask

        return Path(self._listener.path)

    def _begin(self) -> None:
        """Take clients from now on; the last thing that a service's making does."""
        self._loop.run(self._watch)

    def _watch(self) -> None:
        """Look for those who connect. On the I/O thread."""
        this = weakref.ref(self)

        def ready(_: int) -> None:
            service = this()
            if service is not None:
                service._accept()

        self._loop.forget(self._listener.sock.fileno())  # a pause may end meanwhile
        self._loop.watch(self._listener.sock.fileno(), ready)

    def _stop(self) -> None:
        """Let those who connect wait until `_go_on`. On the I/O thread."""
        self._stopped = True
        self._loop.forget(self._listener.sock.fileno())

    def _go_on(self) -> None:
        self._stopped = False
        if not self._closed:
            self._watch()

    def _pause(self, seconds: float) -> None:
        """Let those who connect wait. On the I/O thread."""
        this = weakref.ref(self)

        def go_on() -> None:
            service = this()
            if service is not None and not service._closed and not service._stopped:
                service._watch()

        self._loop.forget(self._listener.sock.fileno())
        if seconds < threading.TIMEOUT_MAX:
            self._loop.later(seconds, go_on)

    # -- clients ---------------------------------------------------------------------------------

    def clients(self) -> list[UserClient]:
        """List the clients that are connected and alive."""
        with self._lock:
            return cast("list[UserClient]", list(self._clients))

    def wait_client(self, timeout: float | None = None) -> UserClient:
        """Wait for the next client that is admitted.

        Raises
        ------
        TimedOutError, ClosedError
        """
        return self._joining.wait_for(self._next_client, timeout, lambda: self._no_client(timeout))

    async def wait_client_async(self, timeout: float | None = None) -> UserClient:
        """As `wait_client`, for asyncio; cancelling it loses no client."""
        return await self._joining.wait_for_async(
            self._next_client, timeout, lambda: self._no_client(timeout)
        )

    def _next_client(self) -> UserClient | None:
        if self._unseen:
            return cast("UserClient", self._unseen.pop(0))
        self._check_open()
        return None

    def _no_client(self, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"no client connected to service {self.name!r} within {timeout} s: is one started, "
            f"and does it look for {self._listener.path}?",
            errno=errno.ETIMEDOUT,
        )

    def watch_clients(self, watcher: Callable[[UserClient, bool], object] | None) -> None:
        """Have `watcher(client, joined)` called for each client that comes, and that leaves.

        On the I/O thread: it must not wait. It takes the place of the one before.
        """
        self._watcher = watcher

    def _tell_watcher(self, client: Accepted, joined: bool) -> None:
        watcher = self._watcher
        if watcher is None:
            return
        try:
            watcher(cast("UserClient", client), joined)
        except Exception:
            log.exception("service.watcher_failed", extra={"service": self.name})

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

    def _new_client(self, sock: sockets.socket) -> UserClient:
        raise NotImplementedError

    def _accept(self) -> None:
        if self._closed or self._stopped:
            return
        if self._rate is not None and not self._rate.take():
            self._pause(max(self._rate.wait, _PAUSE))
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
        if self._has_room(sock):
            self._take_in(sock)

    def _has_room(self, sock: sockets.socket) -> bool:
        """Whether there are descriptors for one more client; else it is turned away."""
        if not _is_of_reserve(sock.fileno()):
            return True
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        log.warning("service.no_descriptors", extra={"service": self.name})
        refusal = AccessDeniedError(
            f"service {self.name!r} takes no further client: of its {most:,} descriptors no more "
            f"than {most - sock.fileno():,} are left, and those serve the clients that it has; "
            "raise its `ulimit -n`",
            errno=errno.EMFILE,
        )
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # it has gone already
            sock.send(protocol.encode(failed(0, refusal)), sockets.MSG_NOSIGNAL)
        close_socket(sock)
        return False

    def _take_in(self, sock: sockets.socket) -> None:
        try:
            client = self._new_client(sock)
            client.start()
        except (MemdescError, OSError) as error:  # it has gone already, or we have no descriptor
            log.debug("service.client_lost", extra={"service": self.name, "why": str(error)})
            close_socket(sock)
            return
        with self._lock:
            self._strangers[client] = None
            oldest = next(iter(self._strangers)) if len(self._strangers) > STRANGERS else None
        if oldest is not None:
            oldest._end(
                PeerGoneError(
                    f"task {oldest.task.pid} was dropped: it did not greet while {STRANGERS} "
                    "others came",
                    errno=errno.ECONNABORTED,
                )
            )

    def _refusal(self, task: Task) -> AccessDeniedError | None:
        """Why a client that greets is not let in; None where it is."""
        if not self.admits(task):
            return AccessDeniedError(
                f"service {self.name!r} does not admit user {task.credentials.uid} "
                f"(task {task.pid}): its owner decides by allow=…",
                errno=errno.EACCES,
            )
        with self._lock:
            clients, of_task = len(self._clients), self._of_task[task]
        for limit, have in (("clients", clients), ("clients_per_task", of_task)):
            most = getattr(self.limits, limit)
            if have >= most:
                log.warning("service.full", extra={"service": self.name, "limit": limit})
                whom = f" of task {task.pid}" if limit == "clients_per_task" else ""
                return AccessDeniedError(
                    f"service {self.name!r} has as many clients{whom} as it takes at a time "
                    f"({have:,} of {most:,}): close some, or let it say limits=Limits({limit}=…)",
                    errno=errno.EDQUOT,
                )
        return None

    def _joined(self, client: Accepted) -> None:
        with self._joining:
            self._strangers.pop(client, None)
            self._clients.append(client)
            self._of_task[client.task] += 1
            self._unseen.append(client)
            self._joining.notify_all()
        self._tell_watcher(client, True)

    def _left(self, client: Accepted) -> None:
        with self._joining:
            self._strangers.pop(client, None)
            if client in self._unseen:
                self._unseen.remove(client)
            if client not in self._clients:
                return
            self._clients.remove(client)
            self._of_task[client.task] -= 1
            if not self._of_task[client.task]:
                del self._of_task[client.task]
        self._tell_watcher(client, False)

    # -- lifetime --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(
                f"service {self.name!r} was closed, or belongs to the parent of this forked "
                "process: make a new Service here"
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._closed

    def close(self) -> None:
        """End the service: give up the name and end every connection. Again is a no-op."""
        with self._joining:
            if self._closed:
                return
            self._closed = True
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
            self._ending()

    def _ending(self) -> None:
        """Let go of what a capability holds; called once, when no client is left."""

    def forked(self) -> None:
        """In a fork child: the service stays the parent's."""
        self._lock = self._joining = Condition()
        self._finalizer.detach()
        if not self._closed:
            self._closed = True
            self._listener.close()
        self._clients.clear()
        self._of_task.clear()
        self._unseen.clear()
        self._strangers.clear()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"service {self.name!r} belongs to this process: connect({self.name!r}) in the other "
            "one instead of pickling it"
        )

    def _offers(self) -> Offers:
        """What clients find by name, by the method of `Connection` that opens it."""
        return {}


def _told(service: Accepting) -> tracing.Told:
    return None if service.closed else (service.name, 0)


class Accepted(Peer):
    """Base of `UserClient`: greets, and is let in or not. Each capability builds on it."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(sock, task, service.limits, allow_copy=False)
        self.admitted = False
        self._service: Service | None = service

    def _may_keep(self, fd: int) -> bool:
        return not _is_of_reserve(fd)

    def _greet(self, service: Service, hello: protocol.Hello) -> None:
        if hello.version != protocol.VERSION:
            raise ProtocolError(
                f"the client speaks version {hello.version}, this service {protocol.VERSION}",
                errno=errno.EPROTO,
            )
        refusal = service._refusal(self.task)
        if refusal is not None:
            self._send_if_there(failed(0, refusal))
            self._end(refusal)
            return
        self.admitted = True
        service._joined(self)  # first: when its connect returns, we list it
        self._send_if_there(protocol.Welcome(protocol.VERSION, service.name, _may_copy(self.task)))

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        service, self._service = self._service, None
        if service is not None:
            service._left(self)


def _is_of_reserve(fd: int) -> bool:
    """Whether hardly any descriptors are left, when this one has just been had."""
    # The lowest free number is given out: below this one all are taken.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most != resource.RLIM_INFINITY and fd >= most - min(RESERVE, most // 4)


def _abandon(io: Loop, listener: folder.Listener) -> None:
    """Give up the name and the descriptors of a service that was dropped without close()."""
    try:
        listener.remove_name()
    finally:
        io.post(lambda: listener.end(io))


def _may_copy(task: Task) -> bool:
    """Whether this process copies from and to that one's memory by the kernel's leave.

    Not of another user: his memory may lie in a file system of his own, which never answers.
    """
    try:
        same_user = task.credentials.uid == os.geteuid()
        return same_user and route(task) is Route.PROCESS_VM
    except MemdescError:
        return False
