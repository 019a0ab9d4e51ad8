"""Connecting from an asyncio program."""

from __future__ import annotations

from memdesc.services.connection import Connection, reach_async
from memdesc.services.limits import Limits, check_limits
from memdesc.vm.timeouts import check_timeout


async def connect_async(
    name: str,
    *,
    timeout: float | None = 5.0,
    limits: Limits | None = None,
    allow_copy: bool = False,
    reconnect: bool = False,
) -> Connection:
    """As `connect`, without holding the event loop up.

    A connection ends with ``async with`` too; `Connection.call_async` calls the service. Cancelled,
    it leaves nothing: what comes of it is closed.

    Parameters
    ----------
    name : str
        As given to `Service`.
    timeout, limits, allow_copy, reconnect
        As of `connect`.

    Notes
    -----
    A thread looks whether the service is there; only this task waits for it. Where none can be
    started it raises `AllocationError` (EAGAIN).

    Examples
    --------
    >>> import asyncio
    >>> import memdesc as md
    >>> async def main():
    ...     with md.Service("greeter") as service:
    ...         @service.method
    ...         async def greet(name: str) -> str:
    ...             return f"hello {name}"
    ...         async with await connect_async("greeter") as client:
    ...             return await client.call_async("greet", "you")
    >>> asyncio.run(main())
    'hello you'
    """
    check_timeout(timeout)
    limits = Limits(mappings=4096) if limits is None else check_limits(limits)
    found = await reach_async(name, timeout, limits, allow_copy=allow_copy)
    if not reconnect:
        return found
    from memdesc.services.reconnect import ReconnectingConnection

    way = {"name": name, "timeout": timeout, "limits": limits, "allow_copy": allow_copy}
    return ReconnectingConnection(way, found)
