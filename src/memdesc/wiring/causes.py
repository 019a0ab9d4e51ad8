"""Whether a range can be wired, asked beforehand, and why the kernel did not, found afterwards.

It looks and keeps nothing. `claims` locks, counts and undoes.
"""

from __future__ import annotations

import errno
import os
import resource

from memdesc import _core
from memdesc.errors import (
    AllocationError,
    MemdescError,
    UnsupportedError,
    WiringError,
    WiringReason,
    describe_errno,
)
from memdesc.memory.limits import check_available
from memdesc.vm import regions
from memdesc.vm.pages import page_size
from memdesc.vm.proc import read_text
from memdesc.vm.task import Task
from memdesc.wiring.counts import Run

_MINCORE_STEP = 1 << 30
_CAP_IPC_LOCK = 14
_RAISE_LIMIT = (
    "raise it (`ulimit -l`, systemd LimitMEMLOCK=, docker --ulimit memlock=) or grant CAP_IPC_LOCK"
)


def check_memory(runs: list[Run], doing: str) -> None:
    """Raise unless the pages of `runs` that are not resident can be had."""
    missing = sum(_missing(run) for run in runs)
    if not missing:
        return
    try:
        check_available(missing, doing)
    except AllocationError as error:
        # Huge pages come out of their own pool. To tell them is slow, so it is done only now.
        if missing > _huge_bytes(runs):
            raise WiringError(
                str(error), reason=WiringReason.NO_MEMORY, errno=error.errno
            ) from error


def _missing(run: Run) -> int:
    """Bytes of a range that are not resident; a hole is left for mlock to find."""
    start, end = run
    pages = 0
    for at in range(start, end, _MINCORE_STEP):
        try:
            resident = _core.mincore(at, min(_MINCORE_STEP, end - at))
        except OSError:
            break
        pages += resident.count(0)
    return pages * page_size


def own_regions(start: int, end: int) -> tuple[list[regions.Region], int]:
    """Give the regions of this task that overlap a range, and how many it has in all.

    Read line by line: this is asked when memory or regions run out, where a task with 65,530
    of them could not hold the 5 MiB of its maps file.

    Raises
    ------
    AllocationError
        It can not even be read: no descriptor (EMFILE), no memory (ENOMEM).
    """
    kept, count = [], 0
    try:
        with open("/proc/self/maps", "rb", buffering=page_size) as file:
            for line in file:
                count += 1
                low, _, rest = line.partition(b"-")
                if int(low, 16) < end and int(rest[: rest.index(b" ")], 16) > start:
                    kept.append(os.fsdecode(line))
        return regions.parse_maps("".join(kept)), count
    except (OSError, MemoryError) as error:
        raise AllocationError(
            f"this task's regions can not be read: {error}",
            errno=getattr(error, "errno", None) or errno.ENOMEM,
        ) from error


def check_writable(start: int, size: int, doing: str) -> None:
    """Raise if a region of the range is not writable; a hole is left for mlock to find."""
    for region in own_regions(start, start + size)[0]:
        if not region.writable:
            raise WiringError(
                f"cannot {doing} for writing: the region {region.start:#x}-{region.end:#x} "
                f"{region.path or 'without a name'} is {region.permissions}; map it writable, or "
                "prepare it for Direction.OUT",
                reason=WiringReason.PROTECTION,
                errno=errno.EACCES,
            )


def explain(error: OSError, doing: str, tried: list[Run]) -> MemdescError:
    """Give what mlock's answer means; `tried` is unlocked again, its last range had failed.

    ENOMEM stands for five causes, so each is looked for, in the order in which mlock checks.
    """
    told = f"cannot {doing}: {describe_errno(error)}"
    if error.errno == errno.ENOSYS:
        return UnsupportedError(
            f"{told}: a filter hides mlock from this process", errno=error.errno
        )
    if error.errno == errno.EPERM:
        reason, cause = WiringReason.NOT_PRIVILEGED, _without_privilege()
    elif error.errno == errno.ENOMEM:
        try:
            reason, cause = _look(tried)
        except (OSError, MemoryError) as blind:  # neither memory nor descriptors are left
            reason, cause = WiringReason.NO_MEMORY, f"why can not be found out ({blind})"
    else:
        reason, cause = WiringReason.NO_MEMORY, "the pages could not be had; free memory"
    return WiringError(f"{told}: {cause}", reason=reason, errno=error.errno)


def _without_privilege() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"RLIMIT_MEMLOCK is {limit:,} and CAP_IPC_LOCK is not held; {_RAISE_LIMIT}"


def _look(tried: list[Run]) -> tuple[WiringReason, str]:
    """Find why mlock answered ENOMEM to the last of `tried`."""
    start, end = tried[-1]
    with open("/proc/self/status") as file:
        status = file.read()
    limited = _limit_passed(status, sum(high - low for low, high in tried))
    if limited and not _may_lock_any(status):
        return WiringReason.LIMIT, limited
    mapped, count = own_regions(start, end)
    holes = regions.find_holes(mapped, start, end - start)
    if holes:
        at, length = holes[0]
        return WiringReason.NOT_MAPPED, (
            f"{length:,} bytes at {at:#x} are not mapped; wire only what is"
        )
    for region in mapped:
        if region.permissions.startswith("---"):
            return WiringReason.PROTECTION, (
                f"the region {region.start:#x}-{region.end:#x} may not be accessed (PROT_NONE); "
                "mprotect it first"
            )
    most = int(read_text("/proc/sys/vm/max_map_count"))
    if count + 2 >= most:
        return WiringReason.TOO_MANY_MAPPINGS, (
            f"the task has {count:,} regions, vm.max_map_count is {most:,}, and wiring a "
            "part of a region splits it; raise vm.max_map_count or unmap"
        )
    if limited:
        # CAP_IPC_LOCK is shown in a user namespace too, where it lifts no limit.
        return WiringReason.LIMIT, f"{limited}; CAP_IPC_LOCK of a user namespace does not count"
    return _look_at_pages(mapped, start, end)


def _look_at_pages(mapped: list[regions.Region], start: int, end: int) -> tuple[WiringReason, str]:
    try:
        _core.madvise(start, end - start, _core.MADV_POPULATE_READ)
    except OSError as error:
        # EFAULT: touching it would be SIGBUS. Huge pages: their pool is empty.
        if error.errno == errno.EFAULT and not _huge_bytes([(start, end)]):
            return WiringReason.NOT_MAPPED, (
                "the range reaches past the end of its file: nothing lies behind its last pages "
                f"({mapped[-1].path or 'without a name'}); wire less, or make the file larger"
            )
    return WiringReason.NO_MEMORY, (
        "the pages could not be brought into memory; free memory, or enlarge the huge-page pool "
        "where they are huge"
    )


def _limit_passed(status: str, needed: int) -> str:
    """Tell by which numbers `needed` bytes more pass RLIMIT_MEMLOCK; empty if they do not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = regions.parse_status(status).locked
    if limit == resource.RLIM_INFINITY or locked + needed <= limit:
        return ""
    return (
        f"{needed:,} bytes more than the {locked:,} locked already pass RLIMIT_MEMLOCK, which is "
        f"{limit:,}; {_RAISE_LIMIT}"
    )


def _may_lock_any(status: str) -> bool:
    shown = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(shown.split()[1], 16) >> _CAP_IPC_LOCK & 1)


def _huge_bytes(runs: list[Run]) -> int:
    """Bytes of `runs` that huge pages of the kernel's pool lie behind."""
    return sum(
        max(0, min(one.region.end, end) - max(one.region.start, start))
        for one in regions.details(Task.current())
        if one.region.object.kind is regions.ObjectKind.HUGETLB
        for start, end in runs
    )
