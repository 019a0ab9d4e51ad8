"""Service: a process that owns memory and rules who sees it (the driver's side)."""

from __future__ import annotations

import socket as sockets
from typing import final

from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.services.calls.serving import Calling
from memdesc.services.calls.workers import WORKERS, Workers
from memdesc.services.events import Notifying
from memdesc.services.folder import Listener
from memdesc.services.limits import Limits, check_limits
from memdesc.services.offers import Allow
from memdesc.services.queues.parts import Queueing
from memdesc.services.sharing import Sharing
from memdesc.services.statistics import ServiceStatistics, statistics_of
from memdesc.services.streams import Streaming
from memdesc.services.succession import Succeeded
from memdesc.services.taking_over import Inheritance, inherit
from memdesc.services.user_client import UserClient
from memdesc.tables import ARROW
from memdesc.vm.task import Task


@final
class Service(Calling, Notifying, Queueing, Streaming, Sharing, Succeeded):
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
    take_over : bool
        Where a service of this name lives, take its place without a gap: its socket, so that no
        `connect` fails, and what it shares, under the same names. What had a rule of its own
        there, or was not shared with this task, is for the program to share again. Methods,
        queues and streams are the program's own and do not pass. The other service goes on for
        the clients that it has, until it is closed (`superseded`); those that `connect` with
        ``reconnect=True`` come here with their next operation. Both must be of the same user.
    allow_successor : callable, optional
        Takes the `Task` that would take this service's name over, says whether it may; by
        default any of the same user. Called on the I/O thread; must not wait.

    Attributes
    ----------
    inherited : dict of str to ReceivedMemoryDescriptor
        What the service before this one shared with it, by name, also what had a rule of its own.
        Sealed memory is read-only here too: its owner, who could write it, was the other task.
    opens, opened_bytes : int
        How often clients have opened what is shared, and how long that was together.

    Raises
    ------
    NameInUseError
        A living service has the name (EADDRINUSE); with `take_over`, others take it all the time.
    AccessDeniedError
        The runtime folder is not this user's alone (EACCES); with `take_over`, the living service
        is another user's (EPERM), or its `allow_successor` says no (EACCES).
    TimedOutError
        With `take_over`: the living service does not answer.

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
        take_over: bool = False,
        allow_successor: Allow | None = None,
    ) -> None:
        self.inherited: dict[str, ReceivedMemoryDescriptor] = {}
        self._inheritance: Inheritance | None = None
        limits = Limits() if limits is None else check_limits(limits)
        if take_over:
            self._inheritance = inherit(name, for_all=allow is not None)
        super().__init__(name, allow, limits)
        self._work_with(Workers(workers))
        self._allow_successor = allow_successor
        self._share_on()
        self._begin()

    def _open_listener(self, *, for_all: bool) -> Listener:
        if self._inheritance is None:
            return super()._open_listener(for_all=for_all)
        return self._inheritance.listener

    def _share_on(self) -> None:
        """Share what the service before this one shared; not what had a rule of its own there."""
        inheritance, self._inheritance = self._inheritance, None
        for share, descriptor in inheritance.shares if inheritance else ():
            self.inherited[share.name] = descriptor
            if not share.ruled:
                self.share(
                    share.name,
                    descriptor,
                    access=descriptor.max_access,
                    enforced=descriptor.enforced,
                    shape=share.shape,
                    dtype=share.dtype,
                    order="F" if share.column_major else "C",
                    content=share.content if share.content == ARROW else "",
                )

    def _new_client(self, sock: sockets.socket) -> UserClient:
        return UserClient(self, sock, Task.from_socket(sock))

    def statistics(self) -> ServiceStatistics:
        """Tell what the service has now, and what it did; of a closed one too."""
        return statistics_of(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clients)} clients"
        if self.superseded:
            state += ", superseded"
        return f"<Service {self.name!r}: {len(self._shares)} shares, {state}>"
