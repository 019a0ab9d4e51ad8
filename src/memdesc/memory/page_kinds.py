"""The kinds of page that a buffer can be made of."""

from __future__ import annotations

import functools
from enum import Enum
from pathlib import Path

from memdesc.vm.pages import page_size

_MEMINFO = Path("/proc/meminfo")


class PageKind(Enum):
    """What a buffer's pages are."""

    BASE = "base"
    """Pages of `page_size` bytes."""
    HUGE = "huge"
    """Reserved huge pages (hugetlb) of the default size: never paged out, physically contiguous.

    Linux: taken from the pool /proc/sys/vm/nr_hugepages; none there is `AllocationError`.
    """

    @property
    def page_size(self) -> int:
        """Bytes in one page of this kind on this system."""
        return page_size if self is PageKind.BASE else huge_page_size()


@functools.cache
def huge_page_size() -> int:
    """Bytes in a huge page of the default size (0 where the kernel has none); fixed at boot."""
    return meminfo().get("Hugepagesize", 0)


def meminfo() -> dict[str, int]:
    """/proc/meminfo with every size in bytes, the HugePages_* lines in pages."""
    values = {}
    for line in _MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values
