"""Memory to wire in tests, and the kernel's own count of what is locked."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from memdesc import _core
from memdesc.errors import (
    WiringError,
)
from memdesc.vm.pages import page_size
from memdesc.wiring import statistics, wire, wired_bytes

READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
CAP_IPC_LOCK = 14
CLONE_NEWUSER = 0x10000000
MAP_NORESERVE = 0x4000

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def nothing_wired() -> Iterator[None]:
    assert (locked(), wired_bytes(), statistics().tokens) == (0, 0, 0)
    yield
    gc.collect()
    assert (locked(), wired_bytes(), statistics().tokens) == (0, 0, 0)


def pages(count: int, prot: int = READ_WRITE, flags: int = 0) -> _core.MappedMemory:
    """Private memory with unmapped pages on both sides, so that no neighbour merges with it."""
    room = _core.reserve_memory((count + 2) * page_size)
    _core.place_memory(
        room,
        page_size,
        count * page_size,
        prot,
        _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | flags,
        -1,
        0,
    )
    return room


def at(memory: _core.MappedMemory, page: int = 0) -> int:
    """The address of a page of what `pages` gave."""
    return memory.address + (1 + page) * page_size


def unmap(memory: _core.MappedMemory, page: int, count: int) -> None:
    """Unmap behind the library's back, as the owner of a range may."""
    assert libc.munmap(ctypes.c_void_p(at(memory, page)), ctypes.c_size_t(count * page_size)) == 0


def locked() -> int:
    """Pages that the kernel has locked in this process, by its own count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmLck:"))
    return int(line.split()[1]) * 1024 // page_size


def fails(memory: _core.MappedMemory, page: int, count: int, **how: Any) -> WiringError:
    """Wire what can not be wired, and see that nothing came of it."""
    before = locked(), wired_bytes()
    with pytest.raises(WiringError) as caught:
        wire(at(memory, page), count * page_size, keep=memory, **how)
    assert (locked(), wired_bytes()) == before
    return caught.value
