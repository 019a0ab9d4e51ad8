"""The kinds of page that a buffer can be made of."""

from __future__ import annotations

import errno
import functools
from enum import Enum

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import page_size
from memdesc.vm.proc import read_text

_MEMINFO = "/proc/meminfo"
_TRANSPARENT = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"


class PageKind(Enum):
    """What a buffer's pages shall be (`docs/pages.md`)."""

    AUTO = "auto"
    """The largest that can be had without waiting for them: HUGE, TRANSPARENT_HUGE, BASE."""
    BASE = "base"
    """Pages of `page_size` bytes."""
    TRANSPARENT_HUGE = "transparent huge"
    """Huge pages that the kernel puts together of free memory, where a whole one fits; the rest
    is base pages. The kernel may split one later.

    Linux: MADV_COLLAPSE (6.1), or MADV_HUGEPAGE where shmem_enabled allows it; else
    `PageKindError`.
    """
    HUGE = "huge"
    """Reserved huge pages (hugetlb) of the default size: never paged out, physically contiguous.

    Linux: taken from the pool /proc/sys/vm/nr_hugepages; none there is `PageKindError`.
    """

    @property
    def page_size(self) -> int:
        """What the size of such memory, and of each mapping of it, is a multiple of."""
        return huge_page_size() if self is PageKind.HUGE else page_size

    @classmethod
    def _missing_(cls, value: object) -> PageKind:
        raise InvalidArgument(
            f"{value!r} is no kind of page: give PageKind.AUTO, BASE, TRANSPARENT_HUGE or HUGE",
            errno=errno.EINVAL,
        )


@functools.cache
def huge_page_size() -> int:
    """Bytes in a huge page of the default size (0 where the kernel has none); fixed at boot."""
    try:
        return meminfo().get("Hugepagesize", 0)
    except FileNotFoundError:  # no /proc: making any memfd says so
        return 0


def has_free_huge_pages() -> bool:
    """Whether the pool has any page free: cheaper to ask than how much of it is promised."""
    pool = f"/sys/kernel/mm/hugepages/hugepages-{huge_page_size() >> 10}kB/free_hugepages"
    try:
        return int(read_text(pool)) > 0
    except FileNotFoundError:
        return False


@functools.cache
def transparent_page_size() -> int:
    """Bytes in a transparent huge page (0 where the kernel has none); fixed at boot."""
    try:
        return int(read_text(_TRANSPARENT))
    except FileNotFoundError:
        return 0


def mem_available() -> int:
    """MemAvailable of /proc/meminfo, in bytes: each allocation asks for this line alone."""
    return int(read_text(_MEMINFO).partition("\nMemAvailable:")[2].partition("kB")[0]) << 10


def meminfo() -> dict[str, int]:
    """/proc/meminfo with every size in bytes, the HugePages_* lines in pages."""
    values = {}
    for line in read_text(_MEMINFO).splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values
