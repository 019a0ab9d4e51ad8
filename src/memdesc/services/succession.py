"""Succession: the name of a living service passes to another task, and no connect fails.

The successor connects as any client, asks for the listening socket, opens what is shared, and
says when it has all (`taking_over` is its side). Only with that does the name change hands: a
successor that is killed before leaves the old service as it was, and one that is killed after a
name that the next can take. Those who connect meanwhile wait in the socket's own queue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import weakref
from typing import TYPE_CHECKING, Any

from memdesc.errors import AccessDeniedError, MemdescError, NameInUseError, TimedOutError
from memdesc.memory.closing import close_socket
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.services.channel import duplicates
from memdesc.services.folder import BACKLOG
from memdesc.services.limits import Limits
from memdesc.services.logs import log
from memdesc.services.offers import Allow
from memdesc.vm.forks import Flag
from memdesc.vm.task import Task
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from memdesc.services.service import Service

PATIENCE = 5.0
"""Seconds that nobody takes connections for a successor that has not said that it is ready."""


class Succeeded(Accepting):
    """What a service has of it, as the one that is succeeded."""

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self._successor: Accepted | None = None  # that has the socket, and has not taken it
        self._superseded = False
        self._over = Flag()  # superseded, or closed
        self._allow_successor: Allow | None = None
        super().__init__(name, allow, limits)

    @property
    def superseded(self) -> bool:
        """Whether another task serves the name now (`Service(…, take_over=True)`).

        Then nobody connects here any more. Clients that are connected are served until `close`.
        """
        return self._superseded

    def wait_superseded(self, timeout: float | None = None) -> bool:
        """Wait until another task serves the name, or this service was closed (or forked away).

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits for ever.

        Returns
        -------
        bool
            `superseded`; False when the time ran out.
        """
        check_timeout(timeout)
        self._over.wait(timeout)
        return self.superseded

    async def wait_superseded_async(self, timeout: float | None = None) -> bool:
        """As `wait_superseded`, for asyncio."""
        await self._over.wait_async(timeout)
        return self.superseded

    def _begin(self) -> None:
        if self._listener.inherited:
            self._loop.run(self._send_on)
        super()._begin()

    def _send_on(self) -> None:
        """Have those connect again who came before this task listened. On the I/O thread.

        What the kernel says of the other side is of when it began to listen: to them this
        service would be the old one's process.
        """
        sock = self._listener.sock
        sock.listen(BACKLOG)  # now it is this one
        for _ in range(BACKLOG + 1):
            try:
                early, _ = sock.accept()
            except BlockingIOError:
                return
            except OSError:
                self._listener.turn_away()
                continue
            early.setblocking(False)
            with contextlib.suppress(OSError):  # it has gone already
                early.send(protocol.encode(protocol.Moved()), sockets.MSG_NOSIGNAL)
            close_socket(early)

    def _ending(self) -> None:
        super()._ending()
        self._over.set()

    def forked(self) -> None:
        """In a fork child: the name stays the parent's."""
        super().forked()
        self._over = Flag()  # another thread may have held the lock in it
        self._over.set()

    def _admits_successor(self, task: Task) -> bool:
        if task.credentials.uid != os.geteuid():
            return False
        try:
            return self._allow_successor is None or bool(self._allow_successor(task))
        except BaseException:
            log.exception("service.rule_failed", extra={"service": self.name})
            return False

    def _hand_over(self, client: Accepted) -> list[int]:
        """Take no connections for now, and give the listening socket."""
        if not self._admits_successor(client.task):
            raise AccessDeniedError(
                f"service {self.name!r} does not let task {client.task.pid} of user "
                f"{client.task.credentials.uid} take its name: that is for the same user, and "
                "for whom allow_successor=… says",
                errno=errno.EACCES,
            )
        if self._closed or self.superseded or self._successor is not None:
            raise NameInUseError(
                f"the name {self.name!r} passes to another task just now", errno=errno.EBUSY
            )
        fds = duplicates([self._listener.sock.fileno()])
        self._successor = client
        self._stop()
        this, asked = weakref.ref(self), weakref.ref(client)

        def lapse() -> None:
            service, candidate = this(), asked()
            if service is not None and candidate is not None:
                service._take_back(candidate)

        self._loop.later(PATIENCE, lapse)
        return fds

    def _take_back(self, client: Accepted) -> None:
        """Serve the name again: whom it was handed to has gone, or took too long."""
        if self._successor is client:
            self._successor = None
            self._go_on()

    def _pass_on(self, client: Accepted) -> None:
        """Let the name go. What happens from here on does not fail."""
        if self._successor is not client:
            raise TimedOutError(
                f"service {self.name!r} waited {PATIENCE} s for task {client.task.pid} to take "
                "its name, and serves it again",
                errno=errno.ETIMEDOUT,
            )
        self._successor = None
        self._listener.give_away()
        self._superseded = True
        self._over.set()
        with self._lock:
            others = [one for one in (*self._clients, *self._strangers) if one is not client]
        for one in others:
            one._send_if_there(protocol.Moved())
        log.info("service.superseded", extra={"service": self.name, "pid": client.task.pid})


class SucceedingClient(Accepted):
    """What a service's user client has of it."""

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        service = self._service
        if service is None:
            return
        if isinstance(message, protocol.TakeOver):
            self._answer(
                message.id,
                lambda: (protocol.HandedOver(message.id), service._hand_over(self)),
            )
        elif isinstance(message, protocol.Took):
            self._answer(message.id, lambda: self._took(service, message))
        else:
            super()._handle(message, fds, lost)

    def _took(self, service: Service, message: protocol.Took) -> tuple[protocol.Done, list[int]]:
        service._pass_on(self)
        return protocol.Done(message.id), []

    def _ended(self, why: MemdescError) -> None:
        service = self._service
        super()._ended(why)
        if service is not None:
            service._take_back(self)
