"""Memory made with the compiled core alone, for the tests of the core and below it."""

import os
from collections.abc import Callable
from pathlib import Path

from memdesc import _core
from memdesc.vm.pages import page_size

UNMAPPED = page_size  # the page after address 0, which Linux gives to nobody (mmap_min_addr)
READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
ANYWHERE = (_core.MAP_PRIVATE | _core.MAP_ANONYMOUS, -1, 0)


def memfd(length: int = page_size) -> int:
    fd = os.memfd_create("core", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, length)
    return fd


def shared(length: int = page_size, prot: int = READ_WRITE) -> _core.MappedMemory:
    fd = memfd(length)
    try:
        return _core.map_memory(0, length, prot, _core.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)


def private(length: int = page_size, prot: int = READ_WRITE) -> _core.MappedMemory:
    flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
    return _core.map_memory(0, length, prot, flags, -1, 0)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def with_fd(make: Callable[[], int], call: Callable[[int], object]) -> None:
    fd = make()
    try:
        call(fd)
    finally:
        os.close(fd)


def with_memory(memory: _core.MappedMemory, call: Callable[[_core.MappedMemory], object]) -> None:
    """The memory is held while the call runs."""
    call(memory)
