"""What the tests of zones share."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import time
from collections.abc import Callable

from memdesc import debug
from memdesc.alloc import Zone
from memdesc.memory import zone_map
from memdesc.vm.pages import page_size, page_span

_names = itertools.count()


T = "T" if debug.is_on() else ""
"""The flag of tracking, which `memdesc.debug` has in all zones."""


def make(element_size: int = 256, elements: int = 16, **how: object) -> Zone:
    """A zone of so many elements, with a name of its own."""
    alignment = int(how.get("alignment", 16))  # type: ignore[call-overload]
    stride = element_size + -element_size % alignment
    return Zone(f"test {next(_names)}", element_size, elements * stride, **how)  # type: ignore[arg-type]


def poke(address: int, value: int = 0xAB) -> None:
    """Store a byte through a pointer that was kept, as C code would."""
    ctypes.memset(address, value, 1)


def present(address: int, length: int) -> int:
    """Pages of a range that have a frame, by the kernel's own count (pagemap, bit 63)."""
    start, span = page_span(address, length)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        words = os.pread(fd, span // page_size * 8, start // page_size * 8)
    finally:
        os.close(fd)
    return sum(words[at + 7] >> 7 for at in range(0, len(words), 8))


def settled() -> zone_map.ZoneMapStatistics:
    """The zone map's statistics, without what earlier tests left to the collector."""
    gc.collect()
    return zone_map.statistics()


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def balanced(zone: Zone) -> bool:
    told = zone.statistics()
    return told.allocs == told.frees + told.drops + told.in_use
