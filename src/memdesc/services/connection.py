"""Connection: a service as its client sees it (the application's side)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import time
from typing import TYPE_CHECKING, Literal, overload

from memdesc.errors import (
    AccessDeniedError,
    ServiceNotFoundError,
    TaskGoneError,
    TimedOutError,
)
from memdesc.services import folder
from memdesc.services.arrays import ArraysOf
from memdesc.services.calls.calling import CallsTo
from memdesc.services.limits import Limits, check_limits
from memdesc.services.listening import Listening
from memdesc.services.offers import tell_names
from memdesc.services.opening import QueuedTo
from memdesc.services.subscribing import Subscribing
from memdesc.vm.awaiting import in_thread
from memdesc.vm.task import Task
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from memdesc.services.reconnect import ReconnectingConnection


_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
"""Seconds between two tries to connect."""


class Connection(CallsTo, Listening, QueuedTo, Subscribing, ArraysOf):
    """A service as its client sees it; made by `connect`.

    Attributes
    ----------
    task : Task
        The service's process; mappings can be made there (`create_mapping_in_task`).
    name : str
        The service's.

    Notes
    -----
    Threads: safe. Fork: the connection stays the parent's; the child must connect again.
    """

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"task {self.task.pid}"
        return f"<Connection to {self.name!r}: {state}>"


@overload
def connect(
    name: str,
    *,
    timeout: float | None = ...,
    limits: Limits | None = ...,
    allow_copy: bool = ...,
    reconnect: Literal[False] = ...,
) -> Connection: ...
@overload
def connect(
    name: str,
    *,
    timeout: float | None = ...,
    limits: Limits | None = ...,
    allow_copy: bool = ...,
    reconnect: Literal[True],
) -> ReconnectingConnection: ...
def connect(
    name: str,
    *,
    timeout: float | None = 5.0,
    limits: Limits | None = None,
    allow_copy: bool = False,
    reconnect: bool = False,
) -> Connection:
    """Connect to a service, waiting for it to appear.

    Parameters
    ----------
    name : str
        As given to `Service`.
    timeout : float, optional
        Seconds in all to wait for the service to appear and to answer; None waits for ever.
    limits : Limits, optional
        What the service may take of this task; by default that of `Limits`, and 4,096 mappings.
    allow_copy : bool
        Let the service copy this task's memory through the connection (copyin, copyout) where the
        kernel denies it the direct way. It may then read and write any of it.
    reconnect : bool
        Find the next service of that name once this one has ended, or was succeeded: see
        `ReconnectingConnection`.

    Returns
    -------
    Connection
        Ends by `close`, by its ``with`` block, or when it is collected.

    Raises
    ------
    ServiceNotFoundError
        None appeared (ENOENT, ECONNREFUSED).
    AccessDeniedError
        The socket, or the service's rule, does not admit this user (EACCES); or the service has
        as many clients as its `Limits` (EDQUOT) or its descriptors (EMFILE) allow; or tasks of this
        user sent it files that it can not close (EDQUOT).
    TimedOutError
        It is there but does not answer.
    PeerGoneError
        It ended while we greeted it.
    AllocationError
        This process has no file descriptor left (EMFILE).
    """
    check_timeout(timeout)
    limits = Limits(mappings=4096) if limits is None else check_limits(limits)
    if not reconnect:
        return reach(name, timeout, limits, allow_copy=allow_copy)
    from memdesc.services.reconnect import ReconnectingConnection

    way = {"name": name, "timeout": timeout, "limits": limits, "allow_copy": allow_copy}
    return ReconnectingConnection(way, reach(name, timeout, limits, allow_copy=allow_copy))


def reach(
    name: str,
    timeout: float | None,
    limits: Limits,
    *,
    allow_copy: bool = False,
    appears: bool = True,
) -> Connection:
    """Connect; where the service need not appear any more, without waiting for that."""
    until = None if timeout is None else time.monotonic() + timeout
    folder.open_folder(name)
    while True:
        sock = _reach(name, until, timeout, appears=appears)
        with contextlib.suppress(TaskGoneError):
            connection = _welcomed(name, sock, until, limits, allow_copy=allow_copy)
            if not connection.moved:
                return connection
            connection.close()
        # Who had the socket has ended, or passed it on: another has the name, or will.
        if until is not None and time.monotonic() > until:
            raise _ended_meanwhile(name, timeout)
        time.sleep(_FIRST_PAUSE)


async def reach_async(
    name: str, timeout: float | None, limits: Limits, *, allow_copy: bool = False
) -> Connection:
    """As `reach`, in an event loop: a thread looks into the folder, and none waits."""
    import asyncio

    until = None if timeout is None else time.monotonic() + timeout
    await in_thread(lambda: folder.open_folder(name))
    pause, over = _FIRST_PAUSE, False
    while True:
        try:
            connection = await in_thread(
                lambda: _begun(
                    name, _reach(name, 0.0, timeout, appears=True), limits, allow_copy=allow_copy
                ),
                Connection.close,
            )
            if await _welcomed_async(connection, until):
                return connection
            over = _is_over(until, pause)
        except (ServiceNotFoundError, TimedOutError):
            if _is_over(until, pause):
                raise
        except TaskGoneError:
            over = _is_over(until, pause)
        if over:
            raise _ended_meanwhile(name, timeout)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _ended_meanwhile(name: str, timeout: float | None) -> ServiceNotFoundError:
    return ServiceNotFoundError(
        f"service {name!r} ended as we connected to it, and none took its name within {timeout} s",
        errno=errno.ECONNREFUSED,
    )


def _begun(name: str, sock: sockets.socket, limits: Limits, *, allow_copy: bool) -> Connection:
    try:
        connection = Connection(name, sock, Task.from_socket(sock), limits, allow_copy=allow_copy)
    except BaseException:
        sock.close()
        raise
    try:
        connection._greet()
    except BaseException:
        connection.close()
        raise
    return connection


def _is_over(until: float | None, pause: float) -> bool:
    """Whether there is no time for another try after that pause."""
    return until is not None and time.monotonic() + pause > until


def _left(until: float | None) -> float | None:
    """Seconds that a service has to answer our greeting."""
    return None if until is None else max(until - time.monotonic(), 0.05)


def _welcomed(
    name: str, sock: sockets.socket, until: float | None, limits: Limits, *, allow_copy: bool
) -> Connection:
    connection = _begun(name, sock, limits, allow_copy=allow_copy)
    try:
        connection._be_welcomed(_left(until))
    except BaseException:
        connection.close()
        raise
    return connection


async def _welcomed_async(connection: Connection, until: float | None) -> bool:
    """Be welcomed, in an event loop; False where another has the name, or will."""
    try:
        await connection._be_welcomed_async(_left(until))
    except BaseException:
        connection.close()
        raise
    if connection.moved:
        connection.close()
    return not connection.moved


def _reach(
    name: str, until: float | None, timeout: float | None, *, appears: bool
) -> sockets.socket:
    """Connect a socket, trying again while no one listens."""
    path = folder.socket_path(name)
    pause = _FIRST_PAUSE
    while True:
        sock = folder.new_socket()
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            full = isinstance(error, BlockingIOError)
            if _is_over(until, pause) or not (full or appears):
                if full:
                    raise TimedOutError(
                        f"service {name!r} took no connection within {timeout} s: its queue of "
                        "those who wait is full (stopped?)",
                        errno=errno.ETIMEDOUT,
                    ) from error
                raise ServiceNotFoundError(
                    f"no service {name!r} appeared within {timeout} s (no one listens at {path}): "
                    f"start it, or check the name{_others(name)} and MEMDESC_RUNTIME_DIR",
                    errno=error.errno,
                ) from error
        except PermissionError as error:
            sock.close()
            # A service opens its socket to others a moment after it made it (the umask).
            if pause > 0.02:
                raise AccessDeniedError(
                    f"the socket {path} does not admit user {os.geteuid()}: its owner lets others "
                    "in with Service(…, allow=…)",
                    errno=error.errno,
                ) from error
        except BaseException:
            sock.close()
            raise
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _others(name: str) -> str:
    """Tell of the services that there are, where one is not."""
    found = [] if "/" in name else [one for one in folder.living_names() if one != name]
    return f" (there is {tell_names(name, found)})" if found else ""
