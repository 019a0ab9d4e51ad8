"""Connecting from an asyncio program."""

from __future__ import annotations

from typing import Any

from memdesc.services.connection import Connection, connect
from memdesc.vm.awaiting import in_thread


async def connect_async(name: str, **options: Any) -> Connection:
    """As `connect`, without holding the event loop up.

    A connection ends with ``async with`` too; `Connection.call_async` calls the service. Cancelled,
    it leaves nothing: what comes of it is closed.

    Parameters
    ----------
    name : str
        As given to `Service`.
    **options
        As of `connect`.

    Notes
    -----
    It waits in one of at most 32 threads, which end when nobody connects any more. Where none can
    be started it raises `AllocationError` (EAGAIN).

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
    return await in_thread(lambda: connect(name, **options), Connection.close)
