"""Service: a process that owns memory and rules who sees it (the driver's side)."""

from __future__ import annotations

import socket as sockets
from typing import final

from memdesc.services.accepting import Allow
from memdesc.services.calls.serving import Calling
from memdesc.services.calls.workers import WORKERS, Workers
from memdesc.services.events import Notifying
from memdesc.services.limits import Limits
from memdesc.services.queues.parts import Queueing
from memdesc.services.sharing import Sharing
from memdesc.services.streams import Streaming
from memdesc.services.user_client import UserClient
from memdesc.vm.task import Task


@final
class Service(Calling, Notifying, Queueing, Streaming, Sharing):
    """Shares descriptors under names with the processes that connect (the driver's side).

    Parameters
    ----------
    name : str
        A name, or a path with a slash; see `memdesc.services.folder`.
    allow : callable, optional
        Takes the client's `Task` (its `credentials` are the kernel's word), says whether it is
        admitted. By default: the same user. Called on the I/O thread; must not wait.
    limits : Limits, optional
        What each client may take; by default that of `Limits`.
    workers : int
        Threads, at most, that the methods of this service run in (`method`), of which one client
        has half. They are started as they are needed.

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

    def __init__(
        self,
        name: str,
        *,
        allow: Allow | None = None,
        limits: Limits | None = None,
        workers: int = WORKERS,
    ) -> None:
        super().__init__(name, allow, Limits() if limits is None else limits)
        self._work_with(Workers(workers))
        self._begin()

    def _new_client(self, sock: sockets.socket) -> UserClient:
        return UserClient(self, sock, Task.from_socket(sock))

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clients)} clients"
        return f"<Service {self.name!r}: {len(self._shares)} shares, {state}>"
