"""Bytes made immutable: by giving a buffer's memory away, by copying what changed, or all.

The semantics are one: the bytes as they were. What is copied, and why, is told.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memdesc import _core
from memdesc.descriptors import copy_on_write
from memdesc.descriptors.copy_on_write import (
    SnapshotReason,
    allocate_like,
    empty_page_table,
)
from memdesc.errors import AllocationError, MemdescError, SealedError, describe_errno
from memdesc.mapping import Extent
from memdesc.memory.allocation import Allocation, Request
from memdesc.memory.lifecycle import State
from memdesc.memory.limits import check_available
from memdesc.memory.memfd import OwnedObject
from memdesc.memory.page_kinds import PageKind
from memdesc.memory.populate import in_parallel, workers_for
from memdesc.vm.changes import Run
from memdesc.vm.pages import Access, page_size, round_page

_MOST_RUNS = 499
"""Changed runs that a snapshot keeps apart: they make a thousand extents with those between."""
_STEP = 1 << 20
_BOUNCE = 128 << 10
"""Bytes read word by word and then written: they stay in the processor's cache."""

Reader = Callable[[int, memoryview], None]
"""Copies bytes from an offset into a buffer. Called by several threads at once."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Immutable bytes: where they lie, how many were copied for that, and why."""

    extents: tuple[Extent, ...]
    copied_bytes: int = 0
    reason: SnapshotReason | None = None


def freeze_buffer(
    allocation: Allocation,
    length: int,
    read: Reader,
    attach: Callable[[], None],
    *,
    prepared: bool,
) -> Frozen:
    """Freeze the first `length` bytes of a buffer, copying as little as can be.

    Parameters
    ----------
    allocation : Allocation
        The buffer's; its object is locked meanwhile.
    length : int
        Bytes, 1 or more.
    read : Reader
        Of the owner's view.
    attach : callable
        Moves the buffer to new memory where it needs an object of its own again.
    prepared : bool
        Whether the buffer is wired.
    """
    object_ = allocation.object
    with object_.lock:
        reason, known = None, object_.lifecycle.state is State.DETACHED
        if not known:
            reason = copy_on_write.detach(allocation, attach, prepared=prepared)
        if reason is None:
            frozen = object_.frozen
            if frozen is None:  # moving it away was interrupted: nothing is known of its pages
                reason = SnapshotReason.CHANGED
            elif not copy_on_write.freeze(frozen):
                reason = SnapshotReason.PINNED
            else:
                whole = Extent(frozen, 0, length)
                runs = copy_on_write.changes(allocation, length, _MOST_RUNS) if known else []
                if runs is not None and 2 * sum(size for _, size in runs) <= length:
                    return _with_changes(whole, runs, read)
                reason = SnapshotReason.SCATTERED
    return copied(read, length, reason, name=object_.name, pages=object_.pages)


def copied(
    read: Reader,
    length: int,
    reason: SnapshotReason,
    *,
    name: str,
    pages: PageKind = PageKind.AUTO,
) -> Frozen:
    """Copy `length` bytes into new memory and freeze it."""
    steps = [(at, at, min(_STEP, length - at)) for at in range(0, length, _STEP)]
    object_ = _filled(read, steps, None, length, _file_name(name), pages)
    return Frozen((Extent(_frozen(object_), 0, length),), length, reason)


def _with_changes(whole: Extent, runs: Sequence[Run], read: Reader) -> Frozen:
    """The frozen object, with copies of the changed runs in the place of those."""
    frozen, length = whole.object, whole.length
    assert isinstance(frozen, OwnedObject)
    if not runs:
        return Frozen((whole,))
    steps, places, size = [], [], 0
    for start, nbytes in runs:
        place = round_page(size, frozen.page_size)  # all but the last are whole pages
        places.append(place)
        steps += [
            (start + at, place + at, min(_STEP, nbytes - at)) for at in range(0, nbytes, _STEP)
        ]
        size = place + nbytes
    if frozen.page_size == page_size:
        copies = _frozen(_written(read, steps, size, frozen.name))
    else:  # such files have no write()
        copies = _frozen(_filled(read, steps, frozen, size, frozen.name, frozen.pages))
    extents, at = [], 0
    for (start, nbytes), place in zip(runs, places, strict=True):
        if at < start:
            extents.append(Extent(frozen, at, start - at))
        extents.append(Extent(copies, place, nbytes))
        at = start + nbytes
    if at < length:
        extents.append(Extent(frozen, at, length - at))
    return Frozen(tuple(extents), sum(nbytes for _, nbytes in runs), SnapshotReason.CHANGED)


def _filled(
    read: Reader,
    steps: Sequence[tuple[int, int, int]],
    beside: OwnedObject | None,
    size: int,
    name: str,
    pages: PageKind,
) -> OwnedObject:
    """Copy into new memory, mapped by nobody any more: steps are (from, to, bytes)."""
    allocation = allocate_like(beside, Request(size, pages, Access.READ_ONLY, name=name))
    object_ = allocation.give_object()
    try:
        # A fork child would hold a writable mapping for good, and forbid the seal.
        _core.madvise(allocation.address, object_.size, _core.MADV_DONTFORK)
        with memoryview(allocation.window(object_.size)) as into:

            def work(index: int, _: int) -> None:
                start, to, nbytes = steps[index]
                with into[to : to + nbytes] as part:
                    read(start, part)

            _in_parallel(work, len(steps))
        empty_page_table(allocation.address, object_.size, object_.page_size)
    except BaseException:
        object_.close()
        raise
    return object_


def _written(
    read: Reader, steps: Sequence[tuple[int, int, int]], size: int, name: str
) -> OwnedObject:
    """Copy into new base pages by write(), which neither clears nor maps them first."""
    doing = f"copying {size:,} changed bytes of {name!r} for a snapshot"
    check_available(size, doing)
    object_ = OwnedObject(name, round_page(size), pages=PageKind.BASE, max_access=Access.READ_ONLY)

    def work(index: int, _: int) -> None:
        start, to, nbytes = steps[index]
        with memoryview(bytearray(min(nbytes, _BOUNCE))) as words:
            for at in range(0, nbytes, _BOUNCE):
                with words[: nbytes - at] as part:
                    read(start + at, part)
                    _write(object_.own_fd(), part, to + at)

    try:
        _in_parallel(work, len(steps))
    except OSError as error:
        object_.close()
        if isinstance(error, MemdescError):
            raise
        raise AllocationError(
            f"{doing}: {describe_errno(error)}; free memory, or close snapshots",
            errno=error.errno,
            requested=size,
        ) from error
    except BaseException:
        object_.close()
        raise
    return object_


def _write(fd: int, part: memoryview, offset: int) -> None:
    done = 0
    while done < len(part):
        done += os.pwrite(fd, part[done:], offset + done)


def _in_parallel(work: Callable[[int, int], None], count: int) -> None:
    in_parallel(work, count, 1, max(workers_for(count, 1), 1))


def _frozen(object_: OwnedObject) -> OwnedObject:
    if not copy_on_write.freeze(object_):
        raise SealedError(
            f"the copy for a snapshot of {object_.name!r} can not be sealed: a child that was "
            "started meanwhile has it mapped; take the snapshot again",
            errno=errno.EBUSY,
        )
    return object_


def _file_name(name: str) -> str:
    """A descriptor's name as a memfd can carry it: that of several can be long."""
    return os.fsdecode(os.fsencode(name.replace("\0", " "))[:249])
