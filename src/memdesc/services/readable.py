"""Waiting for a descriptor in an asyncio event loop."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memdesc.services.failures import no_descriptor

if TYPE_CHECKING:
    import asyncio


async def readable(fd: int) -> None:
    """Wait in the running event loop until a descriptor is readable.

    By a duplicate of it: so several tasks may wait for one, and its owner may close it meanwhile.

    Raises
    ------
    AllocationError
        This process has no descriptor left (EMFILE).
    """
    import asyncio

    loop = asyncio.get_running_loop()
    try:
        own = os.dup(fd)
    except OSError as error:
        raise no_descriptor("wait for events", error) from error
    try:
        ready = loop.create_future()
        loop.add_reader(own, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(own)
    finally:
        os.close(own)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
