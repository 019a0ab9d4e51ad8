"""One call on the client's side, as a future: `Connection.begin` gives it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from memdesc.handover import discard
from memdesc.services import protocol
from memdesc.services.failures import rebuilt
from memdesc.vm.forks import Condition
from memdesc.vm.telling import bare
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from memdesc.services.calls.calling import CallsTo


class PendingCall(Future[Any]):
    """A call that was made and whose result is not here yet; made by `Connection.begin`.

    A `concurrent.futures.Future`: `result(timeout)`, `exception`, `done`, `add_done_callback`,
    `cancel`. What has come is decoded by who first asks for it. Callbacks run on the I/O thread:
    they must not wait, and calls from there are refused.

    `cancel` also succeeds while the service is at work: it is told, and cancels an async handler.
    Keeps the connection open until then.
    """

    def __init__(
        self, connection: CallsTo, number: int, read: Callable[[Any, list[int]], Any]
    ) -> None:
        self.fds: list[int] = []
        self._user = connection.task.credentials.uid
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]
        self.number = number
        self.answer: Any = None
        self._connection: CallsTo | None = connection
        self._read = read
        self._reading = threading.Lock()
        self._decoded: tuple[Any, BaseException | None] | None = None

    def wake(self) -> None:
        """Tell those who wait that the answer is here, or none will come. On the I/O thread."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        answer = self.answer
        try:
            if answer is None:
                self.set_exception(connection._gone_again())
            elif isinstance(answer, protocol.Returned):
                self.set_result(None)
            else:
                self.set_exception(rebuilt(answer))
        except InvalidStateError:  # cancelled meanwhile
            self._drop()
            self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """Wait for it no longer, and tell the service; False where it is done."""
        if not super().cancel():
            return False
        connection, self._connection = self._connection, None
        if connection is not None:  # else it was cancelled before
            self.set_running_or_notify_cancel()
            connection._cancel_call(self.number)
        return True

    def result(self, timeout: float | None = None) -> Any:
        """Give what the method returned, waiting for it; raises what it raised."""
        check_timeout(timeout)
        end = self._end_of_connection()
        error: BaseException | None = None
        try:
            if end is not None:
                raise end
            super().result(timeout)
            value, error = self._outcome()
            if error is not None:
                raise error
            return value
        finally:
            del self, end, error  # see telling; and a call keeps its error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Give what the call raised, or None, waiting for it."""
        check_timeout(timeout)
        error = self._end_of_connection() or super().exception(timeout)
        return error if error is not None else self._outcome()[1]

    def _end_of_connection(self) -> BaseException | None:
        """Why no answer can come, if that is so: in a fork child nobody would tell."""
        connection = self._connection
        if connection is not None and connection.closed and self.answer is None:
            return connection._gone_again()
        return None

    def _outcome(self) -> tuple[Any, BaseException | None]:
        """Decode the answer, once."""
        with self._reading:
            if self._decoded is None:
                answer, self.answer = self.answer, None
                fds, self.fds = self.fds, []
                try:
                    self._decoded = self._read(answer, fds), None
                except Exception as error:  # noqa: BLE001 (it goes to who asks)
                    self._decoded = None, bare(error)  # this frame has the call, which has it
            return self._decoded

    def _drop(self) -> None:
        fds, self.fds = self.fds, []
        discard(fds, self._user)

    def __del__(self) -> None:
        if self.fds:  # nobody asked for the result
            self._drop()
