"""One call on the service's side, from its arrival to its answer.

Its arguments are checked where its handler runs; but memory is looked at by a worker thread only,
as copying from a task can take long: an async handler gets it ready, and what it returns is packed
by a worker where it is large.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any

import msgspec

from memdesc.copyio import bytes_of
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MemdescError,
    RemoteError,
)
from memdesc.handover import discard
from memdesc.services import protocol
from memdesc.services.calls.incoming import Incoming, count_bytes, decoding
from memdesc.services.calls.methods import Method
from memdesc.services.calls.outgoing import Outgoing
from memdesc.services.calls.workers import Workers
from memdesc.services.failures import failed

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task as AsyncTask

    from memdesc.services.calls.serving import CallingClient

log = logging.getLogger("memdesc.services")
_encode = msgspec.msgpack.Encoder().encode
_SMALL = (type(None), bool, int, float, str)


class Running:
    """A call that was taken and not yet answered. Takes its file descriptors over.

    Answered exactly once, unless its client has gone; cancelling changes what the answer says.
    """

    __slots__ = (
        "_client",
        "_events",
        "_fds",
        "_method",
        "_workers",
        "call",
        "cancelled",
        "files",
        "nbytes",
        "task",
    )

    def __init__(
        self,
        client: CallingClient,
        method: Method,
        call: protocol.Call,
        fds: list[int],
        workers: Workers,
    ) -> None:
        self.call = call
        self.files = len(fds)
        self.nbytes = count_bytes(call)
        self.cancelled = False
        self.task: AsyncTask[Any] | None = None
        self._client = client
        self._method = method
        self._fds = fds
        self._workers = workers
        self._events: AbstractEventLoop | None = None

    # -- on the I/O thread -----------------------------------------------------------------------

    def begin(self, events: AbstractEventLoop | None) -> None:
        """Have it done; of an async method in that loop."""
        self._events = events
        try:
            if events is not None and not self.call.memory:
                self._in_loop(self._start)
            else:
                self._workers.submit(self._client.task.pid, self.run)
        except MemdescError as error:
            self._dismiss(error)

    def cancel(self) -> None:
        """Cancel an async handler, withdraw what has not begun, drop the result of all else."""
        self.cancelled = True
        if self._workers.withdraw(self._client.task.pid, self.run):
            self._dismiss(_cancelled())
        elif self._events is not None:
            try:
                self._events.call_soon_threadsafe(self._cancel_task)
            except RuntimeError:  # the loop was closed, and with it the handler has ended
                self._dismiss(_cancelled())

    def _cancel_task(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _dismiss(self, error: MemdescError) -> None:
        """Answer a call that is not done."""
        fds, self._fds = self._fds, []
        discard(fds, self._client.task.credentials.uid)
        self._fail(error)

    # -- where handlers run ----------------------------------------------------------------------

    def run(self) -> None:
        """On a worker: check the arguments, and run a handler, or have an async one start."""
        try:
            memory = self._unpacked()
            positional, named = self._bound(memory)
            if self._method.is_async:
                self._in_loop(self._start, memory, positional, named)
                return
            result = self._method.function(*positional, **named)
        except BaseException as error:  # noqa: BLE001 (it goes to the client)
            self._fail(error)
        else:
            self._finish(result, memory)

    def _start(
        self,
        memory: Incoming | None = None,
        positional: list[Any] | None = None,
        named: dict[str, Any] | None = None,
    ) -> None:
        """In the event loop: run the handler as a task."""
        if self.cancelled:
            self._dismiss(_cancelled())
            return
        assert self._events is not None
        try:
            if memory is None:
                memory = self._unpacked()
                positional, named = self._bound(memory)
            work = self._method.function(*(positional or ()), **(named or {}))
            self.task = self._events.create_task(work)
        except BaseException as error:  # noqa: BLE001 (it goes to the client)
            self._fail(error)
        else:
            self.task.add_done_callback(lambda task: self._ended(task, memory))

    def _ended(self, task: AsyncTask[Any], memory: Incoming) -> None:
        """In the event loop: the handler has returned, or not."""
        if task.cancelled():
            self._fail(_cancelled())
            return
        error = task.exception()
        if error is not None:
            self._fail(error)
            return
        result = task.result()
        if self.call.into is None and isinstance(result, _SMALL):
            self._finish(result, memory)
            return
        try:
            self._workers.submit(self._client.task.pid, lambda: self._finish(result, memory))
        except MemdescError as failure:
            self._fail(failure)

    def _in_loop(self, what: Any, *arguments: Any) -> None:
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(what, *arguments)
        except RuntimeError as error:
            raise ClosedError(
                f"the event loop that {self._method.name}() runs in was closed"
            ) from error

    def _unpacked(self) -> Incoming:
        fds, self._fds = self._fds, []
        return Incoming(self.call.memory, fds, self._client.task)

    def _bound(self, memory: Incoming) -> tuple[list[Any], dict[str, Any]]:
        call = self.call
        record = call.arguments if call.record is None else memory.record(call.record)
        with decoding(memory):
            return self._method.bind(record, self._client)

    # -- the answer ------------------------------------------------------------------------------

    def _finish(self, result: Any, memory: Incoming) -> None:
        """Send what the handler returned, or store it where the client wants it."""
        outgoing = Outgoing(self._client.task.credentials.uid, lends=False, readable=False)
        try:
            if self.cancelled:
                self._dismiss(_cancelled())
                return
            record = None
            if self.call.into is None:
                value, record = self._packed(result, outgoing)
            else:
                value = msgspec.Raw(_encode(self._fill(result, memory)))
            answer = protocol.Returned(self.call.id, value, tuple(outgoing.memory), record)
            self._client._answered_call(self.call.id, answer, outgoing.fds)
        except BaseException as error:  # noqa: BLE001 (it goes to the client)
            self._fail(error)
        finally:
            outgoing.close()

    def _packed(self, result: Any, outgoing: Outgoing) -> tuple[msgspec.Raw, int | None]:
        """Make the record of a result. Of what it is made of, a stranger learns nothing."""
        try:
            return outgoing.value(result)
        except InvalidArgument as error:
            log.warning(
                "call.result_refused %s(): %s",
                self._method.name,
                error.message,
                extra={"method": self._method.name, "pid": self._client.task.pid},
            )
            raise InvalidArgument(
                f"the result of {self._method.name}() can not travel: the log of task "
                f"{os.getpid()} says why",
                errno=error.errno,
            ) from error

    def _fill(self, result: Any, memory: Incoming) -> int:
        """Store the bytes of a result in the client's own buffer; there is no other one."""
        assert self.call.into is not None
        target = memory.descriptor(self.call.into)
        try:
            view = bytes_of(result)
        except (InvalidArgument, TypeError) as error:
            raise InvalidArgument(
                f"{self._method.name}() returned {type(result).__name__}: only contiguous bytes "
                "and arrays are stored with into=",
                errno=errno.EINVAL,
            ) from error
        with view:
            target.write_bytes(0, view)
            return view.nbytes

    def _fail(self, error: BaseException) -> None:
        """Send what went wrong: ours as what it is, a handler's bug as no more than that."""
        if not isinstance(error, (MemdescError, BufferError)):
            error = self._bug(error)
        self._client._answered_call(self.call.id, failed(self.call.id, error), ())

    def _bug(self, error: BaseException) -> RemoteError:
        reference = os.urandom(4).hex()
        client = self._client
        log.error(
            "call.failed %s: %s() for task %d",
            reference,
            self._method.name,
            client.task.pid,
            exc_info=error,
            extra={"reference": reference, "method": self._method.name, "pid": client.task.pid},
        )
        return RemoteError(
            f"{self._method.name}() failed in task {os.getpid()}: its log says why, at {reference}",
            reference=reference,
        )


def _cancelled() -> MemdescError:
    return MemdescError("the call was cancelled", errno=errno.ECANCELED)
