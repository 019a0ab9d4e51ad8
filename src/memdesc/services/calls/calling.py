"""Calling a service's methods: what a connection has of it."""

from __future__ import annotations

import errno
import functools
import socket as sockets
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from memdesc.errors import (
    InvalidArgument,
    MemdescError,
    ProtocolError,
)
from memdesc.handover import discard
from memdesc.services import protocol
from memdesc.services.calls.incoming import Form, Incoming, count_files, decoding
from memdesc.services.calls.lent import LentMemory
from memdesc.services.calls.outgoing import Outgoing
from memdesc.services.copier import read_own, write_own
from memdesc.services.limits import Limits
from memdesc.services.link import Link
from memdesc.services.protocol.calls import Lent
from memdesc.vm.awaiting import time_limit
from memdesc.vm.task import Task
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from memdesc.services.calls.pending import PendingCall


class CallsTo(Link):
    """What a connection has of it."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(name, sock, task, limits, allow_copy=allow_copy)
        self._service_copies = False
        self._lent = LentMemory()
        self._no_lent = weakref.finalize(self, self._lent.abandon, task)
        self._no_lent.atexit = False

    # -- the face --------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        /,
        *arguments: Any,
        timeout: float | None = 5.0,
        into: Any = None,
        returns: Any = None,
        **named: Any,
    ) -> Any:
        """Call a method of the service, and wait for what it returns.

        Parameters
        ----------
        method : str
            As the service named it.
        *arguments, **named
            Numbers, text, bytes, lists, dicts, dataclasses, msgspec Structs, arrays, descriptors
            and mappings. Up to 4,096 bytes go in the message; what is larger crosses as
            `memdesc.crossing` tells: what lies in a descriptor is not copied. All must stay as it
            is until the call is answered. Parameters named as one of those below: by position.
        timeout : float, optional
            Seconds for all of the call; None waits for ever. Then the service is told that nobody
            waits any more. A method that it does not have is not waited for, as `map` waits for
            what is not shared yet.
        into : buffer or MemoryDescriptor, optional
            Where the service stores the bytes that the method returns, and nowhere else.
        returns : type, optional
            What the result is checked against and made into: of a `list[Point]`, say, Structs
            instead of dicts; of `memoryview` no copy.

        Returns
        -------
        object
            Arrays and views are read-only, and show the service's own pages where they lie in a
            descriptor there. With `into` the number of bytes stored.

        Raises
        ------
        MethodNotFoundError
            The service has no such method (ENOENT).
        InvalidArgument
            The arguments do not fit the method's signature, or can not travel; or the result does
            not fit `returns` (EINVAL).
        RemoteError
            The method failed; the service's log says why, under `reference`.
        LimitError
            Too many calls of this connection are in flight, or too much memory beside them
            (EDQUOT).
        TimedOutError
            No answer in time (ETIMEDOUT), or the service does not read (ENOBUFS). With `into` it
            may still be stored: the buffer is kept until the service is done.
        PeerGoneError, ClosedError
        MemdescError
            What the method raised of this library's errors.

        Notes
        -----
        I/O Kit: IOConnectCallMethod. Linux: one message each way; larger memory by memfds, or by
        process_vm_readv and process_vm_writev of private memory. Where the kernel denies these,
        this connection copies for the service what was lent, while the call lasts.
        """
        check_timeout(timeout)
        form = _form(returns)
        message, outgoing = self._prepared(method, arguments, into, named)
        number = message.id
        try:
            self._lent.hold(number, outgoing)
            answer, fds = self.request(
                message, protocol.Returned, outgoing.fds, timeout, self._when_late(number)
            )
        except BaseException:
            self._call_failed(number)
            raise
        finally:
            outgoing.close()
        self._lent.let_go(number)
        return _read(self.task, form, answer, fds)

    def begin(
        self,
        method: str,
        /,
        *arguments: Any,
        into: Any = None,
        returns: Any = None,
        **named: Any,
    ) -> PendingCall:
        """Call a method of the service, without waiting; many calls can be in flight.

        Parameters as of `call`. What can not be sent raises here; all else when the future is
        asked.

        Returns
        -------
        PendingCall
            A `concurrent.futures.Future`.
        """
        from memdesc.services.calls.pending import PendingCall

        if self._loop.here:
            raise MemdescError("a call on the I/O thread: make it on another thread")
        read = functools.partial(_read, self.task, _form(returns))
        message, outgoing = self._prepared(method, arguments, into, named)
        number = message.id
        pending = PendingCall(self, number, read)
        try:
            self._lent.hold(number, outgoing)
            pending.add_done_callback(_Release(self._lent, number))
            self._expect(number, pending)
            self._ask(message, outgoing.fds)
        except BaseException:
            pending._connection = None
            if self._give_up(number, self._when_late(number)):  # an interrupt: it may be sent
                self._call_failed(number)
            else:
                self._lent.let_go(number)
            raise
        finally:
            outgoing.close()
        return pending

    async def call_async(
        self,
        method: str,
        /,
        *arguments: Any,
        timeout: float | None = 5.0,
        into: Any = None,
        returns: Any = None,
        **named: Any,
    ) -> Any:
        """As `call`, in an asyncio program: only this coroutine waits.

        Cancelling the task that waits cancels the call, and the service is told.
        """
        import asyncio

        check_timeout(timeout)
        pending = self.begin(method, *arguments, into=into, returns=returns, **named)
        try:
            async with time_limit(timeout, lambda: self._silent(f"{method}()", timeout)):
                return await asyncio.wrap_future(pending)
        finally:
            pending.cancel()
            del pending  # it keeps its error, which keeps this frame

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # -- a call's memory -------------------------------------------------------------------------

    def _prepared(
        self, method: str, arguments: tuple[Any, ...], into: Any, named: dict[str, Any]
    ) -> tuple[protocol.Call, Outgoing]:
        """Make the message of a call, and what goes with it."""
        protocol.check_name(method, "a method")
        if self._gone is not None:
            raise self._gone_again()
        outgoing = Outgoing(self.task.credentials.uid, lends=True, readable=self._service_copies)
        try:
            record, place = outgoing.arguments(arguments, named)
            target = None if into is None else outgoing.into(into)
        except BaseException:
            outgoing.close()
            raise
        memory = tuple(outgoing.memory)
        return protocol.Call(self.next_id(), method, record, memory, place, target), outgoing

    def _when_late(self, number: int) -> Callable[[Any], None]:
        """What is done with an answer for which nobody waits: a call's memory is let go."""
        lent = self._lent  # not this connection, which may be dropped meanwhile
        return lambda _: lent.let_go(number)

    def _call_failed(self, number: int) -> None:
        """Tell the service where nobody waits for its answer any more."""
        self._lent.revoke(number)
        with self._lock:
            waits = number in self._late
        if waits:
            self._send_if_there(protocol.Cancel(number))
        elif self._gone is None:
            self._lent.let_go(number)  # it was answered, or never sent

    def _cancel_call(self, number: int) -> None:
        """Wait for an answer no longer, and tell the service."""
        if self._give_up(number, self._when_late(number)):
            self._call_failed(number)

    # -- on the I/O thread -----------------------------------------------------------------------

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Welcome):
            self._service_copies = message.copies
            super()._handle(message, fds, lost)
        elif isinstance(message, protocol.ReadMemory | protocol.WriteMemory):
            self._copy_lent(message)
        else:
            super()._handle(message, fds, lost)

    def _copy_lent(self, message: protocol.ReadMemory | protocol.WriteMemory) -> None:
        """Copy for the service what it was lent."""
        fill = isinstance(message, protocol.WriteMemory)
        nbytes = len(message.data) if isinstance(message, protocol.WriteMemory) else message.nbytes

        def work(lent: bool) -> None:
            allowed = lent or self.allow_copy
            if isinstance(message, protocol.WriteMemory):
                self._answer(message.id, lambda: write_own(message, allowed=allowed))
            else:
                self._answer(message.id, lambda: read_own(message, allowed=allowed))

        self._lent.copy(message.address, nbytes, fill=fill, work=work)

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        self._no_lent()


class _Release:
    """Lets a call's memory go when its future is done. Cancelled, it is not: that waits."""

    def __init__(self, lent: LentMemory, number: int) -> None:
        self._lent = lent
        self._number = number

    def __call__(self, pending: Any) -> None:
        if pending.answer is not None:  # of no answer the connection's end says what becomes of it
            self._lent.let_go(self._number)


@functools.lru_cache(maxsize=256)
def _cached_form(kind: Any) -> Form:
    return Form(kind)


_anything = Form(Any)


def _form(returns: Any) -> Form:
    """Give the form of results of a type."""
    if returns is None:
        return _anything
    try:
        return _cached_form(returns)
    except TypeError:  # a type that can not be hashed
        return Form(returns)


def _read(task: Task, form: Form, answer: protocol.Returned, fds: list[int]) -> Any:
    """Make the result of an answer and its descriptors, which it takes over."""
    if count_files(answer.memory) != len(fds) or any(
        isinstance(one, Lent) for one in answer.memory
    ):
        discard(fds, task.credentials.uid)
        raise ProtocolError(
            f"task {task.pid} answered with {len(fds)} descriptors, and memory that is not theirs",
            errno=errno.EPROTO,
        )
    memory = Incoming(answer.memory, fds, task)
    record = answer.value if answer.record is None else memory.record(answer.record)
    with decoding(memory):
        try:
            return form.read(record)
        except InvalidArgument as error:
            raise InvalidArgument(f"the result: {error}", errno=errno.EINVAL) from error
