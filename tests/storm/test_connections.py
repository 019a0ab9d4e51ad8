"""Many connections of one asyncio program to one service: all answered, all closed, nothing left.

A thousand with MEMDESC_STORM=long (`make storm`), two hundred otherwise.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator

import pytest

import memdesc as md

CONNECTIONS = 1000 if os.environ.get("MEMDESC_STORM") == "long" else 200


async def _storm() -> None:
    limits = md.Limits(connections_per_second=None)
    async with md.Service("storm", limits=limits) as service:

        @service.method
        async def double(number: int) -> int:
            return 2 * number

        async def one(number: int) -> int:
            async with await md.connect_async("storm", timeout=60) as client:
                opened.append(client)
                if len(opened) == CONNECTIONS:
                    all_open.set()
                await all_open.wait()
                doubled: int = await client.call_async("double", number, timeout=60)
                return doubled

        opened: list[md.Connection] = []
        all_open = asyncio.Event()
        answers = await asyncio.gather(*(one(number) for number in range(CONNECTIONS)))
        assert answers == [2 * number for number in range(CONNECTIONS)]
        while service.clients():
            await asyncio.sleep(0.001)


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_many_connections_of_one_asyncio_program(many_files: int) -> None:
    if many_files < 8 * CONNECTIONS:
        pytest.skip(f"{CONNECTIONS} connections need more descriptors than {many_files}")
    asyncio.run(_storm())
