"""UserClient: one client as its service sees it (I/O Kit: IOUserClient)."""

from __future__ import annotations

import errno
import socket as sockets
from typing import TYPE_CHECKING, Any, final

from memdesc.errors import (
    AccessDeniedError,
    MemdescError,
    ProtocolError,
)
from memdesc.handover import pack
from memdesc.services import protocol
from memdesc.services.failures import failed
from memdesc.services.peer import Peer
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.services.service import Service

_SHARES_AT_ONCE = 128


@final
class UserClient(Peer):
    """One client of a service.

    Attributes
    ----------
    task : Task
        The client, held by pidfd, with its `credentials` as the kernel gives them.
    admitted : bool
        Whether it has greeted and the service's rule let it in.
    """

    def __init__(
        self, service: Service, sock: sockets.socket, task: Task, mapping_limit: int
    ) -> None:
        super().__init__(sock, task, mapping_limit, allow_copy=False)
        self.admitted = False
        self._service: Service | None = service
        self._told: dict[str, int] = {}  # lengths of what it watches, as it last heard

    def __repr__(self) -> str:
        state = "gone" if self.closed else "connected"
        return f"<UserClient task {self.task.pid}, user {self.task.credentials.uid}, {state}>"

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        service = self._service
        if service is None:
            return
        if not self.admitted:
            if not isinstance(message, protocol.Hello):
                raise ProtocolError("the first message must be Hello", errno=errno.EPROTO)
            self._greet(service, message)
        elif isinstance(message, protocol.ListShares):
            self._answer(message.id, lambda: self._list(service, message))
        elif isinstance(message, protocol.OpenShare):
            self._answer(message.id, lambda: self._open(service, message))
        elif isinstance(message, protocol.WatchLength):
            self._answer(message.id, lambda: self._watch(service, message))
        else:
            super()._handle(message, fds, lost)

    def _greet(self, service: Service, hello: protocol.Hello) -> None:
        if hello.version != protocol.VERSION:
            raise ProtocolError(
                f"the client speaks version {hello.version}, this service {protocol.VERSION}",
                errno=errno.EPROTO,
            )
        if not service.admits(self.task):
            refusal = AccessDeniedError(
                f"service {service.name!r} does not admit user {self.task.credentials.uid} "
                f"(task {self.task.pid}): its owner decides by allow=…",
                errno=errno.EACCES,
            )
            self._send_if_there(failed(0, refusal))
            self._end(refusal)
            return
        self.admitted = True
        service._joined(self)  # first: when its connect returns, we list it
        self._send_if_there(protocol.Welcome(protocol.VERSION, service.name))

    def _list(
        self, service: Service, request: protocol.ListShares
    ) -> tuple[protocol.Shares, list[int]]:
        shares = service._visible_to(self)[request.start :]
        page: list[protocol.Share] = []
        room = protocol.MAX_MESSAGE - 1024
        for share in shares[:_SHARES_AT_ONCE]:
            room -= len(protocol.encode(share))
            if room < 0:
                break
            page.append(share)
        return protocol.Shares(request.id, tuple(page), len(page) < len(shares)), []

    def _open(
        self, service: Service, request: protocol.OpenShare
    ) -> tuple[protocol.Opened, list[int]]:
        shared = service._find(self, request.name)
        portable, fds = pack(
            shared.descriptor,
            shared.access,
            enforced=shared.enforced,
            user=self.task.credentials.uid,
        )
        return protocol.Opened(request.id, shared.described(), portable), fds

    def _watch(
        self, service: Service, request: protocol.WatchLength
    ) -> tuple[protocol.Length, list[int]]:
        nbytes = service._find(self, request.name).descriptor.length
        self._told[request.name] = nbytes
        return protocol.Length(request.id, request.name, nbytes), []

    def tell_lengths(self) -> None:
        """Tell of the lengths that changed, unless it has not read all yet. On the I/O thread.

        Then it is told when it has: once, of the lengths as they are by then.
        """
        service = self._service
        if service is None:
            return
        for name, told in self._told.items():
            try:
                nbytes = service._find(self, name).descriptor.length
            except MemdescError:
                continue  # it is shared no longer, or not with this one
            if nbytes != told and not self._queue:
                self._told[name] = nbytes
                self._send_if_there(protocol.LengthChanged(name, nbytes))

    def _write_waiting(self) -> None:
        super()._write_waiting()
        if not self._queue:
            self.tell_lengths()

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        service, self._service = self._service, None
        if service is not None:
            service._left(self)
