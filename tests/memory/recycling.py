"""A recycler for one test, on a machine that has room and no stress, whatever this one has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memdesc import BufferMemoryDescriptor, recycler
from memdesc.memory.kept import RecyclerStatistics, Settings
from memdesc.memory.limits import Available
from memdesc.memory.recycler import Recycler

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ROOM = 8 * GIB


@contextmanager
def fresh_recycler(limit: int | None = None, trust_same_user: bool = False) -> Iterator[None]:
    """Have nothing kept at first, and nothing of the test kept after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recycler, "available", lambda: Available(ROOM, "the test's machine", ""))
        patch.setattr(recycler, "is_stalling", lambda: False)
        patch.setattr(recycler, "_recycler", Recycler(Settings(limit, trust_same_user)))
        try:
            yield
        finally:
            recycler.trim()


def statistics() -> RecyclerStatistics:
    return recycler.statistics()


def freed(nbytes: int = 256 * KIB, **options: object) -> tuple[int, int]:
    """Make a buffer, fill it, free it: device and inode of the memory that it had."""
    with BufferMemoryDescriptor(nbytes, **options) as buffer:  # type: ignore[arg-type]
        buffer.write_bytes(0, b"\xff" * nbytes)
        identity: tuple[int, int] = buffer.memory.identity
    return identity


def identity_of(buffer: BufferMemoryDescriptor) -> tuple[int, int]:
    return buffer.memory.identity
