"""What the conformance suite asks of a kind of descriptor, and how it looks behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import pytest

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import MappingError, MappingReason
from memdesc.vm.pages import Access, Direction, page_size, page_span
from memdesc.vm.regions import Region, region_at, task_status
from memdesc.vm.task import Task

LENGTH = 3 * page_size + 100
"""Bytes of the descriptors that the tests make, unless they say otherwise: never whole pages."""

OUTSIDE: list[tuple[int, int | None]] = [
    (0, LENGTH + 1),
    (1, LENGTH),
    (LENGTH, 1),
    (LENGTH + 1, 0),
    (LENGTH + 1, None),
    (-1, 1),
    (-1, None),
    (0, -1),
    (2**63 - 1, 1),
    (2**63 - 1, 2**63 - 1),
]
"""Ranges (offset, length) that leave such a descriptor; None is "to the end"."""


class Kind(ABC):
    """What a kind of descriptor tells the tests about itself."""

    @abstractmethod
    def make(self, length: int, max_access: Access, direction: Direction) -> MemoryDescriptor:
        """Make a descriptor of `length` zeros, anywhere inside their pages.

        What it lies in must live as long as the descriptor, or the test instance.
        """

    @abstractmethod
    def behind(self, descriptor: MemoryDescriptor) -> list[tuple[int, int]]:
        """Tell where in this task the bytes lie, as (address, length), not asking the descriptor.

        The memory there must be writable.
        """

    def pages_behind(self, descriptor: MemoryDescriptor) -> int:
        """Tell how many pages `prepare` wires, which are those that `page_counts` counts."""
        return sum(page_span(*run)[1] for run in self.behind(descriptor)) // page_size

    def new(
        self,
        length: int = LENGTH,
        max_access: Access = Access.READ_WRITE,
        direction: Direction = Direction.OUT_IN,
    ) -> MemoryDescriptor:
        """Make one, with what the tests use where it does not matter."""
        return self.make(length, max_access, direction)

    def look(self, descriptor: MemoryDescriptor, offset: int, nbytes: int) -> bytes:
        """Read bytes without the descriptor."""
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            whole = b"".join(os.pread(memory.fileno(), n, at) for at, n in self.behind(descriptor))
        assert len(whole) == descriptor.length
        return whole[offset : offset + nbytes]

    def put(self, descriptor: MemoryDescriptor, offset: int, data: bytes) -> None:
        """Store bytes without the descriptor."""
        start = 0
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for address, length in self.behind(descriptor):
                low, high = max(offset, start), min(offset + len(data), start + length)
                if low < high:
                    piece = data[low - offset : high - offset]
                    assert os.pwrite(memory.fileno(), piece, address + low - start) == len(piece)
                start += length


def pattern(length: int, seed: int = 1) -> bytes:
    """Give bytes that differ from page to page and from word to word."""
    return bytes(
        (seed + at * 7 + at // 256 * 31 + at // page_size * 101) & 255 for at in range(length)
    )


def region(address: int) -> Region | None:
    """Give this task's region at an address, from /proc/self/maps."""
    with Task.current() as task:
        return region_at(task, address)


def is_gone(before: Region | None, address: int) -> bool:
    """Whether a region is there no more; another may have taken its place meanwhile."""
    assert before is not None
    now = region(address)
    return now is None or (now.start, now.permissions, now.object) != (
        before.start,
        before.permissions,
        before.object,
    )


def locked_pages() -> int:
    """Pages locked in this task by the kernel's own count."""
    with Task.current() as task:
        return task_status(task).locked // page_size


@contextlib.contextmanager
def living_task() -> Iterator[tuple[Task, subprocess.Popen[bytes]]]:
    """Start a program that knows nothing of us and waits; it is ended afterwards."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        with Task(child.pid) as task:
            yield task, child
    finally:
        child.kill()
        child.wait()


def refused(descriptor: MemoryDescriptor, **how: Any) -> MappingReason:
    """Map what can not be mapped, see that nothing came of it, and give the reason."""
    before = descriptor.mappings()
    with pytest.raises(MappingError) as caught:
        descriptor.map(**how)
    assert caught.value.errno is not None
    assert descriptor.mappings() == before
    return caught.value.reason
