"""UserClient: one client as its service sees it (I/O Kit: IOUserClient)."""

from __future__ import annotations

import errno
from typing import Any, final

from memdesc.errors import ProtocolError
from memdesc.services import protocol
from memdesc.services.calls.serving import CallingClient
from memdesc.services.describing import describe
from memdesc.services.events import NotifiedClient
from memdesc.services.queues.parts import QueueingClient
from memdesc.services.sharing import SharingClient
from memdesc.services.streams import StreamingClient
from memdesc.services.succession import SucceedingClient


@final
class UserClient(
    CallingClient,
    NotifiedClient,
    QueueingClient,
    StreamingClient,
    SharingClient,
    SucceedingClient,
):
    """One client of a service.

    Attributes
    ----------
    task : Task
        The client, held by pidfd, with its `credentials` as the kernel gives them.
    admitted : bool
        Whether it has greeted and the service's rule let it in.
    """

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        service = self._service
        if service is None:
            return
        if isinstance(message, protocol.Describe):  # who looks after the service is no client
            if self._queue:  # and asks again when he has read
                self._drop("it asked what the service does, and read nothing of it")
                return
            self._answer(message.id, lambda: (describe(service, self.task, message), []))
            return
        if self.admitted:
            super()._handle(message, fds, lost)
            return
        if not isinstance(message, protocol.Hello):
            raise ProtocolError("the first message must be Hello", errno=errno.EPROTO)
        self._greet(service, message)

    def __repr__(self) -> str:
        state = "gone" if self.closed else "connected"
        return f"<UserClient task {self.task.pid}, user {self.task.credentials.uid}, {state}>"
