"""Whether a range can be wired, asked beforehand, and why the kernel did not, found afterwards.

It looks and keeps nothing. `claims` locks, counts and undoes.
"""

from __future__ import annotations

import errno
import resource
from pathlib import Path

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
            resident = _core.mincore(at, min(_MINCORE_STEP, end - at), page_size)
        except OSError:
            break
        pages += resident.count(0)
    return pages * page_size


def check_writable(start: int, size: int, doing: str) -> None:
    for region in regions.regions_in(Task.current(), start, size):
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
        reason, cause = _look(tried)
    else:
        reason, cause = WiringReason.NO_MEMORY, "the pages could not be had; free memory"
    return WiringError(f"{told}: {cause}", reason=reason, errno=error.errno)


def _without_privilege() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"RLIMIT_MEMLOCK is {limit:,} and CAP_IPC_LOCK is not held; {_RAISE_LIMIT}"


def _look(tried: list[Run]) -> tuple[WiringReason, str]:
    """Find why mlock answered ENOMEM to the last of `tried`."""
    task = Task.current()
    start, end = tried[-1]
    limited = _limit_passed(task, sum(high - low for low, high in tried))
    if limited and not _may_lock_any(task):
        return WiringReason.LIMIT, limited
    every = regions.regions(task)
    mapped = [region for region in every if region.start < end and region.end > start]
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
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if len(every) + 2 >= most:
        return WiringReason.TOO_MANY_MAPPINGS, (
            f"the task has {len(every):,} regions, vm.max_map_count is {most:,}, and wiring a "
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


def _limit_passed(task: Task, needed: int) -> str:
    """Tell by which numbers `needed` bytes more pass RLIMIT_MEMLOCK; empty if they do not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = regions.task_status(task).locked
    if limit == resource.RLIM_INFINITY or locked + needed <= limit:
        return ""
    return (
        f"{needed:,} bytes more than the {locked:,} locked already pass RLIMIT_MEMLOCK, which is "
        f"{limit:,}; {_RAISE_LIMIT}"
    )


def _may_lock_any(task: Task) -> bool:
    for line in task.read_proc("status", "read its capabilities").splitlines():
        if line.startswith(b"CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _huge_bytes(runs: list[Run]) -> int:
    """Bytes of `runs` that huge pages of the kernel's pool lie behind."""
    return sum(
        max(0, min(one.region.end, end) - max(one.region.start, start))
        for one in regions.details(Task.current())
        if one.region.object.kind is regions.ObjectKind.HUGETLB
        for start, end in runs
    )
