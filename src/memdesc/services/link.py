"""Link: the client's end of a connection, from the greeting on."""

from __future__ import annotations

import contextlib
import errno
import socket as sockets
import threading
from typing import Any, Self

from memdesc.errors import ClosedError, MemdescError, PeerGoneError, ProtocolError, TimedOutError
from memdesc.services import protocol
from memdesc.services.failures import rebuilt
from memdesc.services.limits import Limits
from memdesc.services.peer import Peer
from memdesc.vm.task import Task


class Link(Peer):
    """Base of `Connection`: greets the service. Each capability builds on it."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(sock, task, limits, allow_copy=allow_copy)
        self.name = name
        self._welcomed = threading.Event()
        self._refused: protocol.Failed | None = None

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Welcome) and not self._welcomed.is_set():
            if message.version != protocol.VERSION:
                raise ProtocolError(f"the service speaks version {message.version}")
            self._welcomed.set()
        else:
            super()._handle(message, fds, lost)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        if answer.id == 0 and isinstance(answer, protocol.Failed) and not self._welcomed.is_set():
            self._refused = answer
            self._welcomed.set()
            return
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
