"""The service that is fuzzed: something of all that a service offers.

server.py NAME   serves until its standard input ends; writes its socket's path first
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

import memdesc as md


def serve(name: str, **options: Any) -> md.Service:
    """Open it; whoever calls this closes it, or ends."""
    service = md.Service(name, **options)
    share(service)
    methods(service)
    service.queue("it", capacity=4096)
    service.queue("writable", capacity=4096, direction=md.Direction.IN)
    service.notify("it", {"value": 1})
    return service


def share(service: md.Service) -> None:
    """Offer memory of each kind."""
    service.share("it", md.BufferMemoryDescriptor(8192), shape=(8192,), dtype="u1")
    writable = md.BufferMemoryDescriptor(100, max_access=md.Access.READ_WRITE)
    service.share("writable", writable)
    parts = [md.BufferMemoryDescriptor(4096), md.BufferMemoryDescriptor(4096)]
    service.share("several", md.MultiMemoryDescriptor(parts))


def methods(service: md.Service) -> None:
    """Offer calls with arguments of each kind."""

    @service.method(name="it")
    def anything(first: Any = None, second: Any = None) -> Any:
        return first

    @service.method(name="writable")
    def sizes(data: bytes, view: memoryview | None = None) -> tuple[int, int]:
        return len(data), 0 if view is None else view.nbytes

    @service.method(name="several")
    async def total(array: NDArray[np.float64], client: md.UserClient) -> float:
        return float(array.sum()) + client.task.pid

    @service.method(name="given")
    def given(memory: md.MemoryDescriptor) -> md.MemoryDescriptor:
        return memory


if __name__ == "__main__":
    logging.getLogger("memdesc").setLevel(logging.ERROR)  # not of each attacker
    with serve(sys.argv[1], allow_successor=lambda task: False) as service:
        print(service.path, flush=True)
        sys.stdin.read()
