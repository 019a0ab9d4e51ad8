"""Link: the client's end of a connection, from the greeting on."""

from __future__ import annotations

import contextlib
import errno
import socket as sockets
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from memdesc.errors import (
    AccessDeniedError,
    ClosedError,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    ShareNotFoundError,
    TimedOutError,
)
from memdesc.services import protocol
from memdesc.services.failures import rebuilt
from memdesc.services.limits import Limits
from memdesc.services.peer import Peer
from memdesc.vm.forks import Flag
from memdesc.vm.task import Task
from memdesc.vm.timeouts import deadline_of

_T = TypeVar("_T")


class _Tries:
    """Asking again and again for what may not be there yet, ever less often, for a time."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._until = deadline_of(timeout)
        self._pause = 0.002

    @property
    def left(self) -> float | None:
        """Seconds that the next answer may take."""
        return None if self._until is None else max(self._until - time.monotonic(), 0.05)

    def pause(self, error: ShareNotFoundError) -> float:
        """Give the seconds before the next try; raise what says that it is not there, after all."""
        if self._until is not None and time.monotonic() + self._pause > self._until:
            waited = f" (waited {self._timeout} s)" if self._timeout else ""
            raise ShareNotFoundError(error.message + waited, errno=error.errno) from None
        pause, self._pause = self._pause, min(self._pause * 1.5, 0.05)
        return pause


class Link(Peer):
    """Base of `Connection`: greets the service. Each capability builds on it."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(sock, task, limits, allow_copy=allow_copy)
        self.name = name
        self._welcomed = Flag()
        self._refused: protocol.Failed | None = None
        self._moved = False

    @property
    def moved(self) -> bool:
        """Whether another task serves the name by now: `connect` again to reach it.

        This connection goes on, with the service that it was made to, until that closes.
        """
        return self._moved

    def stay(self) -> None:
        """Forget that the service was succeeded: its successor is gone."""
        self._moved = False

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Welcome) and not self._welcomed.is_set():
            if message.version != protocol.VERSION:
                raise ProtocolError(f"the service speaks version {message.version}")
            self._welcomed.set()
        elif isinstance(message, protocol.Moved):
            self._moved = True
            self._welcomed.set()  # instead of Welcome: `connect` tries again
        else:
            super()._handle(message, fds, lost)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        if answer.id == 0 and isinstance(answer, protocol.Failed):
            if not self._welcomed.is_set():
                self._refused = answer
                self._welcomed.set()
                return
            error = rebuilt(answer)
            if isinstance(error, AccessDeniedError):  # it was let in, and is no more
                self._end(error)
                return
        super()._answered(answer, fds, lost)

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        self._welcomed.set()

    def _be_welcomed(self, timeout: float | None) -> None:
        self._check_welcome(self._welcomed.wait(timeout), timeout)

    async def _be_welcomed_async(self, timeout: float | None) -> None:
        self._check_welcome(await self._welcomed.wait_async(timeout), timeout)

    def _greet(self) -> None:
        """Say hello. At once: of those who do not, a service keeps 128."""
        self.start()
        with contextlib.suppress(PeerGoneError, ClosedError):
            self.send(protocol.Hello(protocol.VERSION))

    def _check_welcome(self, answered: bool, timeout: float | None) -> None:
        if not answered:
            raise TimedOutError(
                f"service {self.name!r} (task {self.task.pid}) took the connection but did not "
                f"answer within {timeout} s",
                errno=errno.ETIMEDOUT,
            )
        if self._refused is not None:
            raise rebuilt(self._refused)
        if self._gone is not None and not self._moved:
            raise self._gone_again()

    def _ask_about(
        self, question: Callable[[int, str], Any], name: str, kind: type[_T], timeout: float | None
    ) -> tuple[_T, list[int]]:
        """Ask until it is there: a service exists a moment before it offers what it is for.

        `question` makes the message of its id and the name.
        """
        protocol.check_name(name)
        tries = _Tries(timeout)
        while True:
            try:
                return self.request(question(self.next_id(), name), kind, timeout=tries.left)
            except ShareNotFoundError as error:
                pause = tries.pause(error)
            time.sleep(pause)

    async def _ask_about_async(
        self, question: Callable[[int, str], Any], name: str, kind: type[_T], timeout: float | None
    ) -> tuple[_T, list[int]]:
        """As `_ask_about`, for asyncio. Cancelled, what came is closed."""
        import asyncio

        protocol.check_name(name)
        tries = _Tries(timeout)
        while True:
            message = question(self.next_id(), name)
            try:
                return await self.request_async(message, kind, timeout=tries.left)
            except ShareNotFoundError as error:
                pause = tries.pause(error)
            await asyncio.sleep(pause)

    def _peer_gone(self) -> PeerGoneError:
        return PeerGoneError(
            f"service {self.name!r} (task {self.task.pid}) has gone, or ended the connection: "
            "connect again, or connect(…, reconnect=True) in the first place, which does",
            errno=errno.ECONNRESET,
        )

    def __enter__(self) -> Self:
        if isinstance(self._gone, ClosedError):
            raise self._gone_again()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
