"""Wiring: keeping memory of this task resident, counted per page interval over mlock.

Linux does not stack locks: after two mlock and one munlock nothing is locked. So the counts
are kept here. A `Wire` is one claim on a range; pages are locked while any claim covers them,
and unlocked with the last one.

What it does not do: wired pages are never paged out, but the kernel may still move them to
other frames (compaction). Only pinning, by a device or io_uring, stops that. Memory of huge
pages (hugetlb) is never paged out anyway: it can be wired, and VmLck does not count it. Locks
that other code of this process takes by calling mlock itself are not known here, and end when
the last claim on those pages does.

Locks belong to the address space that took them: a fork child has none, so it starts with
empty books, and the claims that it inherits release nothing there.
"""

from memdesc.wiring.claims import (
    Wire,
    WiringStatistics,
    replacing,
    statistics,
    wire,
    wire_count,
    wired_bytes,
)

__all__ = [
    "Wire",
    "WiringStatistics",
    "replacing",
    "statistics",
    "wire",
    "wire_count",
    "wired_bytes",
]
