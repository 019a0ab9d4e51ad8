"""What children of multiprocessing do with the descriptors that they are given."""

from __future__ import annotations

import os
from typing import Any

import memdesc as md


def describe(descriptor: md.MemoryDescriptor) -> dict[str, Any]:
    """What a receiver sees, and may do."""
    extents = descriptor._extents(0, descriptor.length, md.Access.READ_ONLY)
    try:
        descriptor.write_bytes(0, b"child")
        wrote = True
    except md.SealedError:
        wrote = False
    return {
        "pid": os.getpid(),
        "name": descriptor.name,
        "length": descriptor.length,
        "access": descriptor.max_access.name,
        "direction": descriptor.direction.name,
        "objects": [list(extent.object.identity) for extent in extents],
        "bytes": bytes(descriptor.map()),
        "wrote": wrote,
    }


def answer(descriptor: md.MemoryDescriptor, queue: Any) -> None:
    queue.put(describe(descriptor))


def write_all(descriptor: md.MemoryDescriptor, value: int) -> None:
    with descriptor.map() as mapping:
        mapping.array()[:] = value


def total(descriptor: md.MemoryDescriptor) -> int:
    return sum(bytes(descriptor))


def make_and_send(pipe: Any) -> None:
    """A child's own memory, given to the parent; it stays when the child ends."""
    buffer = md.BufferMemoryDescriptor(100, name="childs")
    buffer.write_bytes(0, b"of the child")
    pipe.send(buffer)
    pipe.recv()


def count_open(descriptor: md.MemoryDescriptor, queue: Any) -> None:
    """How many descriptors of that memory this process has, before and after closing."""
    queue.put(_open_of(descriptor.name))
    descriptor.close()
    queue.put(_open_of(descriptor.name) if descriptor.closed else -1)


def _open_of(name: str) -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += f"/memfd:{name} " in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass
    return found
