"""Copy on write: a buffer's memory given to a snapshot, and new memory for the buffer.

Detaching: a private mapping of the object takes the place of the owner's shared one, in one step
(mremap), and the object is sealed. Nothing is copied; both sides see the same pages, and a page
that the owner stores to becomes his own. Which those are the page table tells.

Attaching: the owner's bytes are copied into a new object, whose shared mapping takes the place of
the private one. Both happen under the views: the addresses stay.

Everything is decided before anything is touched: replaced and put back, stores would be lost.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from memdesc import _core
from memdesc.errors import AllocationError, MemdescError, PageKindError, describe_errno
from memdesc.memory.allocation import Allocation, Request, allocate
from memdesc.memory.lease import held_by_others
from memdesc.memory.lifecycle import State
from memdesc.memory.memfd import OwnedObject
from memdesc.memory.page_kinds import PageKind
from memdesc.memory.populate import in_parallel, workers_for
from memdesc.memory.recycler import Contents
from memdesc.vm.changes import Run, changed_runs
from memdesc.vm.forks import no_fork
from memdesc.vm.pages import page_size, round_page
from memdesc.vm.physical import is_present, pagemap
from memdesc.vm.task import Task
from memdesc.wiring import replacing

log = logging.getLogger("memdesc.descriptors")

_WORTH = 16 << 20
"""Bytes of base pages for which another thread pays."""
_PATIENCE = 1.0
"""Seconds for which pinned pages, or a child between fork and exec, may hold up a seal."""


class SnapshotReason(Enum):
    """Why bytes were copied for a snapshot. `docs/snapshots.md` has a row for each."""

    SHARED = "the memory was granted to another task, which would stop following the owner"
    FORKED = "a fork child inherited the owner's mapping"
    REGISTERED = "a device or io_uring has the pages registered"
    EXPOSED = "the program took the memory's own file descriptor"
    WIRED = "the memory is wired"
    MAPPED = "something else has the memory open or mapped, or this user can not tell"
    NOT_OWNED = "it is not a buffer of this task, or a part of one, or several"
    PINNED = "input or output under way, or a mapping unknown to us, keeps the memory writable"
    NO_MEMORY = "there is no memory, or no address space, to reserve for the owner's later stores"
    CHANGED = "the source was stored to since an earlier snapshot that shares its memory"
    SCATTERED = (
        "so much was changed since then, or in so many places, or untold by the kernel, that all "
        "was copied"
    )


def why_not_free(object_: OwnedObject, *, prepared: bool) -> SnapshotReason | None:
    """Say what forbids to replace a buffer's memory behind its owner's view; None if nothing."""
    life = object_.lifecycle
    marks = {
        SnapshotReason.SHARED: life.state is not State.PRIVATE,
        SnapshotReason.FORKED: life.forked,
        SnapshotReason.REGISTERED: life.registrations > 0,
        SnapshotReason.EXPOSED: life.exposed,
        SnapshotReason.WIRED: prepared,
    }
    for reason, holds in marks.items():
        if holds:
            return reason
    try:
        return SnapshotReason.MAPPED if held_by_others(object_.own_fd()) else None
    except OSError:
        return SnapshotReason.MAPPED


def detach(
    allocation: Allocation, attach: Callable[[], None], *, prepared: bool
) -> SnapshotReason | None:
    """Give a buffer's memory to a snapshot, or say why it can not be; the object is locked.

    Afterwards `allocation.object.frozen` is the snapshot's object, not yet sealed.
    """
    object_, size = allocation.object, allocation.object.size
    reason = why_not_free(object_, prepared=prepared)
    if reason is not None:
        return reason
    empty_page_table(allocation.address, size, object_.page_size)
    with no_fork(), replacing(allocation.address, size) as wired:
        reason = why_not_free(object_, prepared=prepared or wired)
        if reason is None:
            reason = _replace(allocation, attach)
    if reason is not None:  # the view stays, and is again a mapping like any other
        with contextlib.suppress(OSError):
            _core.madvise(allocation.address, size, mmap.MADV_NORMAL)
    return reason


def _replace(allocation: Allocation, attach: Callable[[], None]) -> SnapshotReason | None:
    object_, size = allocation.object, allocation.object.size
    prot = _core.PROT_READ | _core.PROT_WRITE
    try:
        private = _core.map_memory(0, size, prot, _core.MAP_PRIVATE, object_.own_fd(), 0)
    except OSError:
        return SnapshotReason.NO_MEMORY
    if _is_populated(private.address):
        return SnapshotReason.WIRED
    object_.split(attach)
    try:
        _core.move_memory(private, 0, size, allocation.memory, allocation.start)
    except OSError:
        object_.rejoin()
        return SnapshotReason.NO_MEMORY
    return None


def empty_page_table(address: int, size: int, granule: int) -> None:
    """Take shared pages out of the page table; they stay in their object.

    Unmapping would do it on one CPU, with the whole address space locked: most of what it costs.
    As for a mapping that is read at random, the kernel then does not note of each page that it was
    used lately, which would take as long again. Who stores meanwhile faults his page in again.
    """
    if granule > page_size:
        return
    workers = max(workers_for(size, _WORTH), 1)

    def work(offset: int, length: int) -> None:
        _core.madvise(address + offset, length, mmap.MADV_DONTNEED)

    with contextlib.suppress(OSError):  # it only saves time
        _core.madvise(address, size, mmap.MADV_RANDOM)
        in_parallel(work, size, _WORTH // 2, workers)


def _is_populated(address: int) -> bool:
    """Whether a mapping has pages as soon as it is made: then all memory is locked (mlockall).

    Those pages are copies from before the mapping took the other one's place.
    """
    try:
        with Task.current() as task:
            return is_present(pagemap(task, address, page_size)[0])
    except PermissionError:  # it has become another user, and may not look at its own pages
        try:
            _core.madvise(address, page_size, mmap.MADV_DONTNEED)
        except OSError:
            return True  # locked; or huge, of which that does not tell
        return False


def freeze(object_: OwnedObject) -> bool:
    """Seal an object whose owner's writable mapping is gone; False if others hold it writable."""
    deadline = time.monotonic() + _PATIENCE
    while not object_.immutable:
        try:
            object_.freeze()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


def changes(allocation: Allocation, length: int, most: int) -> list[Run] | None:
    """List what the owner changed of the first `length` bytes; None if in more than `most` runs.

    None too where this process may not look at its own page table: it has become another user.
    """
    granule = allocation.object.page_size
    try:
        runs = changed_runs(allocation.address, -(-length // granule) * granule, most)
    except PermissionError:
        return None
    if runs is None:
        return None
    return [(start, min(size, length - start)) for start, size in runs]


def attach(allocation: Allocation, used: int) -> int:
    """Move a detached buffer to new memory; give the bytes copied. The object is locked.

    `used` is the buffer's capacity: behind it may be a reserve, which has no pages.

    Stores by other threads wait meanwhile, where this kernel has a userfaultfd for this process;
    elsewhere those may be lost that are made during the copying.

    Raises
    ------
    AllocationError
        Nothing was moved.
    WiringError
        It was moved, but what was wired of it could not be wired again.
    """
    object_, size = allocation.object, allocation.object.size
    doing = f"moving buffer {object_.name!r} of {used:,} bytes away from its snapshots"
    used = round_page(used, object_.page_size)
    reserve = size if used < size else 0
    fresh = allocate_like(
        object_,
        Request(used, object_.pages, object_.max_access, name=object_.name, reserve=reserve),
    )
    # Its addresses are about to show other memory: if interrupted, they must not be recycled.
    kind, fresh.kind = fresh.kind, None
    frozen = object_.frozen
    try:
        with replacing(allocation.address, size):
            object_.doubt()
            _exchange(fresh, allocation, used)
            object_.adopt(fresh.give_object())
            allocation.kind = kind
    except MemdescError:
        raise
    except OSError as error:
        object_.doubt(frozen)
        fresh.close()
        raise AllocationError(
            f"{doing}: {describe_errno(error)}; nothing was moved, its views are as they were",
            errno=error.errno,
            requested=used,
        ) from error
    log.info("buffer.moved", extra={"buffer": object_.name, "bytes": used})
    return used


def _exchange(fresh: Allocation, old: Allocation, used: int) -> None:
    size = old.object.size
    where = (fresh.memory, fresh.start, size, old.memory, old.start, used)
    try:
        watch = _core.watch_stores(old.address, size)
    except OSError:
        _core.exchange_memory(-1, *where)
        return
    try:
        _core.exchange_memory(watch, *where)
    except OSError:
        _core.exchange_memory(-1, *where)  # this kernel can not hold up stores to such memory
    finally:
        os.close(watch)


def allocate_like(object_: OwnedObject | None, request: Request) -> Allocation:
    """New memory, kept warm or fresh, that can lie beside an object's, or in its place.

    Its contents are undefined; what is behind the capacity is zero, as all of it is seen by who
    is given it. Base pages stand in for others that are not to be had.
    """
    request = replace(request, contents=Contents.UNDEFINED)
    base = replace(request, pages=PageKind.BASE)
    for attempt in (request, replace(request, recycle=False), base, replace(base, recycle=False)):
        try:
            made = allocate(attempt)
        except PageKindError:
            continue  # base pages do as well, only slower
        fits = object_ is None or made.object.page_size <= object_.page_size
        if fits and made.object.lifecycle.state is State.PRIVATE:
            if not request.reserve:  # which is never recycled
                rest = made.object.size - request.capacity
                _core.zero_memory(made.memory, made.start + request.capacity, rest)
            return made
        made.close()  # kept from a buffer that was granted, and so has its last seals
    raise AssertionError  # fresh base pages always fit
