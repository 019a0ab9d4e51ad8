"""Methods of a service, and the calls of each of its clients."""

from __future__ import annotations

import errno
import functools
import os
import resource
import socket as sockets
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from memdesc.errors import LimitError, MemdescError, MethodNotFoundError, ProtocolError
from memdesc.handover import MAX_PIECES, too_many_files
from memdesc.loop import loop
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.services.calls.incoming import count_bytes, count_files, count_ranges
from memdesc.services.calls.methods import Method, running_loop
from memdesc.services.calls.running import Running
from memdesc.services.calls.workers import Workers
from memdesc.services.failures import failed
from memdesc.services.limits import Limits
from memdesc.services.offers import Allow, near_names
from memdesc.services.protocol.calls import MAX_MEMORY
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from memdesc.services.service import Service

_F = TypeVar("_F", bound=Callable[..., Any])
_physical = os.sysconf("SC_PHYS_PAGES") * page_size


class _Held:
    """File descriptors beside the calls in flight, by task: one has at most a quarter of all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[Task] = Counter()

    def take(self, task: Task, files: int) -> None:
        """Count a call's; `LimitError` where that task has too many."""
        total = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = max(total // 4, MAX_MEMORY) if total != resource.RLIM_INFINITY else 1 << 30
        with self._lock:
            held = self._held[task] + files
            if held <= most:
                self._held[task] = held
                return
        raise LimitError(
            f"the calls of task {task.pid} that are in flight would have {held:,} descriptors "
            f"beside them, of {most:,} that one task may have: wait for some, or raise the "
            "service's `ulimit -n`",
            errno=errno.EDQUOT,
        )

    def give_back(self, task: Task, files: int) -> None:
        """Count them no more."""
        with self._lock:
            self._held[task] -= files
            if not self._held[task]:
                del self._held[task]


class Calling(Accepting):
    """What a service has of it."""

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self._methods: dict[str, Method] = {}
        self._called = 0  # counted on the I/O thread
        self._events: AbstractEventLoop | None = None
        self._held = _Held()
        self._work_with(Workers())  # which starts none
        super().__init__(name, allow, limits)

    def _work_with(self, workers: Workers) -> None:
        """Have handlers run in these threads; before any client is let in."""
        self._workers = workers
        # By the I/O thread: the collector may strike where this very thread holds their lock.
        self._no_workers = weakref.finalize(
            self, loop().post, functools.partial(workers.close, wait=False)
        )
        self._no_workers.atexit = False

    @overload
    def method(self, function: _F, /, *, name: str | None = None) -> _F: ...

    @overload
    def method(self, /, *, name: str | None = None) -> Callable[[_F], _F]: ...

    def method(self, function: Any = None, /, *, name: str | None = None) -> Any:
        """Let clients call a function; a decorator, also with arguments.

        Its annotations are the types of its arguments, which are checked before it runs: numbers,
        text, `bytes`, `memoryview`, lists, dicts, dataclasses, msgspec Structs, NumPy arrays
        (`numpy.typing.NDArray[…]` checks the element type too) and `MemoryDescriptor`. A parameter
        annotated `UserClient` is the caller, and none of the arguments.

        Arrays and views are read-only and show the caller's own pages where they came as such;
        `bytes` is a copy. Memory that a caller lent (`MemoryDescriptor.with_buffer`) may be used
        until the call is answered.

        What it returns goes back likewise. Errors of this library travel as what they are; all
        else is a `RemoteError`, and its stack stays in this task's log. Replaces the method that
        had the name.

        Parameters
        ----------
        function : callable
            Plain functions run in worker threads, several at a time; async ones in the event loop
            that runs now, else in that of ``async with service``, else in one of a thread of its
            own.
        name : str, optional
            What clients call it; by default the function's own.

        Raises
        ------
        InvalidArgument
            A parameter without annotation, or of a type that does not travel.

        Notes
        -----
        I/O Kit: IOUserClient::externalMethod, with the signature as its dispatch table.

        Examples
        --------
        >>> import memdesc as md
        >>> with md.Service("adder") as service:
        ...     @service.method
        ...     def add(left: int, right: int = 1) -> int:
        ...         return left + right
        ...     with md.connect("adder") as client:
        ...         client.call("add", 2, 3), client.call("add", 2)
        (5, 3)
        """
        if function is None:
            return functools.partial(self._add, name=name)
        return self._add(function, name=name)

    def _add(self, function: _F, *, name: str | None) -> _F:
        method = Method(function, name)
        with self._lock:
            self._check_open()
            self._methods[method.name] = method
        return function

    def _method(self, name: str) -> Method:
        method = self._methods.get(name)
        if method is None:
            raise MethodNotFoundError(
                f"service {self.name!r} has no method {name[:80]!r}{self._nearest(name)}",
                errno=errno.ENOENT,
            )
        return method

    def _nearest(self, name: str) -> str:
        """Suggest the method that has nearly that name. Of few, short ones: clients wait."""
        with self._lock:
            near = near_names(name, self._methods)
        return f": perhaps {near[0]!r}" if near else ""

    def _loop_of(self, method: Method) -> AbstractEventLoop | None:
        """Where an async method runs; None for any other."""
        if not method.is_async:
            return None
        return method.loop or self._events or self._workers.event_loop()

    async def __aenter__(self) -> Self:
        self._check_open()
        self._events = running_loop()
        return self

    async def __aexit__(self, *exc: object) -> None:
        import asyncio

        try:
            await asyncio.sleep(0)  # a handler that woke who leaves answers first
        finally:
            self.close()

    def forked(self) -> None:
        """In a fork child: the threads stay the parent's."""
        super().forked()
        self._no_workers.detach()

    def _ending(self) -> None:
        super()._ending()
        self._no_workers.detach()
        self._workers.close()
        self._methods.clear()  # and what they hold


class CallingClient(Accepted):
    """What a service's user client has of it."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(service, sock, task)
        self._calls: dict[int, Running] = {}
        self._held = service._held

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.Call):
            self._take_call(message, fds, lost)
        elif isinstance(message, protocol.Cancel):
            running = self._calls.get(message.id)
            if running is not None:
                running.cancel()
        else:
            super()._handle(message, fds, lost)

    def _take_call(self, call: protocol.Call, fds: list[int], lost: bool) -> None:
        service = self._service
        if service is None:
            return
        if call.id in self._calls:
            raise ProtocolError(f"call {call.id} is being answered already", errno=errno.EPROTO)
        files = count_files(call.memory)
        if files != len(fds) and not lost:
            raise ProtocolError(
                f"{len(fds)} descriptors came with a call that names {files}", errno=errno.EPROTO
            )
        try:
            if lost:
                raise too_many_files(None)
            self._check_call(call, files)
            method = service._method(call.method)
            events = service._loop_of(method)
            if files:
                self._held.take(self.task, files)
        except MemdescError as error:
            self._send_if_there(failed(call.id, error))
            return
        running = Running(self, method, call, list(fds), service._workers)
        fds.clear()  # they are the call's
        service._called += 1
        with self._lock:
            self._calls[call.id] = running
        running.begin(events)

    def _check_call(self, call: protocol.Call, files: int) -> None:
        with self._lock:
            others = list(self._calls.values())
        most = self.limits.calls
        if len(others) >= most:
            raise LimitError(
                f"{len(others):,} calls of task {self.task.pid} are in flight, of {most:,} that "
                "one connection may have: wait for some, or let the service say "
                "limits=Limits(calls=…)",
                errno=errno.EDQUOT,
            )
        nbytes = count_bytes(call) + sum(one.nbytes for one in others)
        room = _physical if self.limits.call_bytes is None else self.limits.call_bytes
        if nbytes > room:
            raise LimitError(
                f"the calls of task {self.task.pid} that are in flight would have {nbytes:,} "
                f"bytes of arguments, of {room:,} that one connection may have: send less at a "
                "time, or let the service say limits=Limits(call_bytes=…)",
                errno=errno.EDQUOT,
            )
        if not call.memory:
            return
        ranges = count_ranges(call.memory) + sum(count_ranges(one.call.memory) for one in others)
        if ranges > MAX_PIECES:
            raise LimitError(
                f"the calls of task {self.task.pid} that are in flight would have {ranges:,} "
                f"ranges of memory beside them, of {MAX_PIECES:,} that one connection may have: "
                "wait for some",
                errno=errno.EDQUOT,
            )
        if files + sum(one.files for one in others) > MAX_MEMORY:
            raise LimitError(
                f"the calls of task {self.task.pid} that are in flight would have more than "
                f"{MAX_MEMORY} VM objects beside them: wait for some",
                errno=errno.EDQUOT,
            )

    def _answered_call(self, number: int, answer: Any, fds: Sequence[int]) -> None:
        """Send a call's answer; from whatever thread it was made in."""
        with self._lock:
            running = self._calls.pop(number, None)
        if running is None:
            return  # its client has gone
        self._give_back(running)
        try:
            self._send_if_there(answer, fds)
        except MemdescError as error:  # it is too large, or this process has no descriptor left
            self._send_if_there(failed(number, error))

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        with self._lock:
            calls = list(self._calls.values())
            self._calls.clear()
        for running in calls:
            self._give_back(running)
            running.cancel()

    def _give_back(self, running: Running) -> None:
        if running.files:
            self._held.give_back(self.task, running.files)
