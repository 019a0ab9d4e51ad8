"""Events: what a service tells its clients of, the latest of each name, without ever waiting."""

from __future__ import annotations

import errno
import socket as sockets
from typing import TYPE_CHECKING, Any

import msgspec

from memdesc.errors import (
    InvalidArgument,
    LimitError,
    MemdescError,
)
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.services.service import Service
    from memdesc.services.user_client import UserClient


class Notifying(Accepting):
    """What a service has of it."""

    def notify(self, name: str, value: Any = None, *, to: UserClient | None = None) -> int:
        """Tell the clients that listen to a name. Never waits, whatever a client does.

        A client that has not read gets the latest value of each name when it does, and learns how
        many that stands for (`Event.count`).

        Parameters
        ----------
        name : str
            At most 1,024 characters.
        value : object
            What MessagePack can carry, of at most 4,096 bytes when encoded.
        to : UserClient, optional
            Tell this client alone.

        Returns
        -------
        int
            Clients that listen to it.

        Raises
        ------
        InvalidArgument
            The value is larger (EMSGSIZE), or can not travel.
        ClosedError
        """
        protocol.check_name(name, "an event")
        data = protocol.encode_value(value)
        message = protocol.encode(protocol.Notify(name, 1, msgspec.Raw(data)))
        self._check_open()
        if to is None:
            return sum(client._notify(name, data, message) for client in self.clients())
        if not isinstance(to, NotifiedClient):
            raise InvalidArgument(f"to is {to!r}: give a UserClient", errno=errno.EINVAL)
        return int(to._notify(name, data, message))


class NotifiedClient(Accepted):
    """What a service's user client has of it."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(service, sock, task)
        self._listens: set[str] = set()
        # Since its socket was full: by name the latest value, and how many it stands for.
        self._untold: dict[str, tuple[bytes, int]] = {}

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Listen):
            self._answer(message.id, lambda: self._listen(message))
        elif isinstance(message, protocol.Unlisten):
            with self._lock:
                self._listens.discard(message.name)
                self._untold.pop(message.name, None)
            self._send_if_there(protocol.Done(message.id))
        else:
            super()._handle(message, fds, lost)

    def _listen(self, request: protocol.Listen) -> tuple[protocol.Done, list[int]]:
        with self._lock:
            most = self.limits.events
            if request.name not in self._listens and len(self._listens) >= most:
                raise LimitError(
                    f"task {self.task.pid} listens to {most:,} events of the service, the most "
                    "that one client may: close some, or let it say limits=Limits(events=…)",
                    errno=errno.EDQUOT,
                )
            self._listens.add(request.name)
        return protocol.Done(request.id), []

    def _notify(self, name: str, value: bytes, message: bytes) -> bool:
        """Tell it now, or of the latest when it has read; False where it does not listen."""
        with self._lock:
            if self._gone is not None or name not in self._listens:
                return False
            waiting = bool(self._untold)
            if waiting or self._queue or not self._try_send(message, ()):
                self._untold[name] = value, self._untold.get(name, (b"", 0))[1] + 1
                if not waiting:
                    self._loop.post(self._write_waiting)
            return True

    def _write_waiting(self) -> None:
        super()._write_waiting()
        with self._lock:
            if self._gone is not None or self._queue:
                return
            for name, (value, count) in list(self._untold.items()):
                message = protocol.encode(protocol.Notify(name, count, msgspec.Raw(value)))
                if not self._try_send(message, ()):
                    break
                del self._untold[name]
            self._loop.want(self._sock.fileno(), write=bool(self._untold))

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            self._listens.clear()
            self._untold.clear()
