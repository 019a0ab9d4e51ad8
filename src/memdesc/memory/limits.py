"""How much memory can be had before the kernel kills for it.

Allocating past a memory cgroup's limit, or past the machine, is not an error in Linux: it is
SIGKILL. So whoever allocates asks here first (`check_available`), and again between steps.
Between the question and the pages others may take them; what is left of that race, the
out-of-memory killer, is documented with `BufferMemoryDescriptor`.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from memdesc.errors import AllocationError, PageKindError
from memdesc.memory.page_kinds import PageKind, huge_page_size, mem_available, meminfo
from memdesc.vm.cgroups import memory_cgroups


@dataclass(frozen=True, slots=True)
class Available:
    """What the tightest limit leaves: `nbytes`, and which `limit` that is, in words."""

    nbytes: int
    limit: str
    remedy: str


def available(pages: PageKind = PageKind.BASE) -> Available:
    """Tell how many bytes of such pages this process can still get.

    Linux: MemAvailable and the memory cgroups above this process (v1 and v2; the file cache of
    a cgroup counts as available), or HugePages_Free less HugePages_Rsvd. Needs no privilege.
    """
    if pages is PageKind.HUGE:
        info = meminfo()
        free = info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)
        return Available(
            free * huge_page_size(),
            f"the pool of huge pages ({info.get('HugePages_Total', 0)} pages, {free} free)",
            "raise vm.nr_hugepages, or use base pages",
        )
    tightest = Available(
        mem_available(), "the machine's MemAvailable", "free memory or ask for less"
    )
    for group in memory_cgroups():
        if group.limit is None:
            continue
        used = max(group.used - group.file_cache, 0)
        if group.limit - used < tightest.nbytes:
            tightest = Available(
                max(group.limit - used, 0),
                f"the memory cgroup {group.folder} (limit {group.limit:,}, in use {used:,})",
                "raise the cgroup's limit (container: --memory) or ask for less",
            )
    return tightest


def check_available(nbytes: int, doing: str, pages: PageKind = PageKind.BASE) -> None:
    """Raise unless `nbytes` more can be had now.

    Raises
    ------
    AllocationError
        ENOMEM, with `requested` and `available`. Of huge pages: `PageKindError`.
    """
    room = available(pages)
    if nbytes > room.nbytes:
        kind = PageKindError if pages is PageKind.HUGE else AllocationError
        raise kind(
            f"{doing} needs {nbytes:,} bytes, but {room.limit} leaves {room.nbytes:,}: "
            f"{room.remedy}",
            errno=errno.ENOMEM,
            requested=nbytes,
            available=room.nbytes,
        )
