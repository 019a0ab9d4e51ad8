"""Physical pages: what /proc/PID/pagemap tells, and the proof that two tasks see the same ones.

An entry is 64 bits for each base page, huge or not: bit 63 present, 62 swapped, 61 of a file
or shared memory, 0-54 the page frame (Documentation/admin-guide/mm/pagemap.rst). Frame numbers
are shown to CAP_SYS_ADMIN alone, as zeros to everybody else; the other bits are not hidden.
Frames of memory that is not pinned may change at any time.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from memdesc import _core
from memdesc.errors import InvalidArgument, NotPreparedError, NotPrivilegedError, TimedOutError
from memdesc.vm.pages import page_size, page_span
from memdesc.vm.patience import look_at
from memdesc.vm.regions import Region, check_range, find_holes, regions_in
from memdesc.vm.task import Task

_PRESENT = 1 << 63
_SWAPPED = 1 << 62
_FILE_OR_SHARED = 1 << 61
_FRAME = (1 << 55) - 1
_ENTRY_SIZE = 8
_CHUNK = 1 << 17  # entries in one read: 512 MiB of 4 KiB pages, 1 MiB of entries

# A frame may move between the reading of one side and of the other.
_ATTEMPTS = 3


def is_present(entry: int) -> bool:
    """Whether the page is in memory and in the task's page table."""
    return bool(entry & _PRESENT)


def is_swapped(entry: int) -> bool:
    """Whether private memory's page is out on swap (shared memory shows no such bit)."""
    return bool(entry & _SWAPPED)


def is_file_or_shared(entry: int) -> bool:
    """Whether the page is an object's: not a private page, nor a private copy of the object's."""
    return bool(entry & _FILE_OR_SHARED)


def pagemap(task: Task, address: int, length: int) -> array[int]:
    """Give one 64-bit entry for each base page that holds a part of the range.

    Pages that are not mapped have the entry 0.

    Linux: /proc/PID/pagemap; the task's own user or CAP_SYS_PTRACE.

    Raises
    ------
    InvalidArgument
        The range reaches past the task's address space (EINVAL).
    TaskGoneError
        The task has ended (ESRCH).
    NotPrivilegedError
        The kernel does not show this process that task's pages (EACCES).
    """
    entries = array("Q")
    for chunk in _chunks(task, address, length):
        entries.extend(chunk)
    return entries


def _chunks(task: Task, address: int, length: int) -> Iterator[array[int]]:
    check_range(address, length)
    start, whole = page_span(address, length)
    first, count = start // page_size, whole // page_size
    doing = f"read the page table of task {task.pid} for {length} bytes at {address:#x}"
    fd = task.open_proc("pagemap", doing)
    try:
        for at in range(first, first + count, _CHUNK):
            chunk = array("Q", bytes(_ENTRY_SIZE * min(_CHUNK, first + count - at)))
            _fill(task, fd, chunk, at * _ENTRY_SIZE, doing)
            yield chunk
    finally:
        os.close(fd)


def _fill(task: Task, fd: int, chunk: array[int], offset: int, doing: str) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        try:
            got = look_at(task, doing, partial(os.preadv, fd, [rest], offset))
        except TimedOutError:
            raise
        except OSError as error:
            raise task.explain(doing, error) from error
        if not got:
            task.check_alive(doing)  # a task that has ended has no pages to tell of
            raise InvalidArgument(
                f"cannot {doing}: the range reaches past that task's address space",
                errno=errno.EINVAL,
            )
        rest, offset = rest[got:], offset + got
    task.check_alive(doing)


def frames(task: Task, address: int, length: int) -> list[int | None]:
    """Give the page frame number of each base page of a range; None where none is present.

    The physical address is the frame times `page_size`. A page of the huge-page pool is that
    many consecutive frames.

    Linux: as `pagemap`, and CAP_SYS_ADMIN in the first user namespace.
    I/O Kit: `IOMemoryDescriptor::getPhysicalSegment`, which needs prepared memory to hold.

    Raises
    ------
    NotPrivilegedError
        The kernel shows zeros for frames (EPERM): no CAP_SYS_ADMIN.
    """
    return _frames_of(pagemap(task, address, length), task)


def _frames_of(entries: array[int], task: Task) -> list[int | None]:
    found = [entry & _FRAME if entry & _PRESENT else None for entry in entries]
    if 0 in found:  # the first frame of memory belongs to no task
        raise NotPrivilegedError(
            f"cannot read the page frames of task {task.pid}: the kernel shows zeros to a process "
            "without CAP_SYS_ADMIN in the first user namespace; grant it, or, to see whether "
            "memory is the same, compare VM objects",
            errno=errno.EPERM,
        )
    return found


class PhysicalSegment(NamedTuple):
    """Bytes that lie one after the other in physical memory."""

    address: int
    length: int


def physical_runs(spans: Iterable[tuple[int, int]]) -> list[PhysicalSegment]:
    """Give where ranges of this task, one after the other, physically lie: in merged runs.

    Parameters
    ----------
    spans : iterable of tuple of int
        Address and length of each, of what is in memory; the page table is filled first, which
        wired memory needs after it was mapped.

    Linux: as `frames`, and MADV_POPULATE_READ.

    Raises
    ------
    NotPreparedError
        A page is not in memory, and so lies nowhere.
    NotPrivilegedError
        The kernel shows zeros for frames (EPERM): no CAP_SYS_ADMIN.
    """
    runs: list[PhysicalSegment] = []
    with Task.current() as task:
        for address, length in spans:
            start, whole = page_span(address, length)
            _core.madvise(start, whole, _core.MADV_POPULATE_READ)
            found = frames(task, address, length)
            if None in found:
                raise NotPreparedError(
                    f"page {found.index(None)} of {length:,} bytes at {address:#x} is not in "
                    "memory, so it has no physical address: prepare() the descriptor first"
                )
            _join(runs, found, address - start, length)
    return runs


def _join(runs: list[PhysicalSegment], found: list[int | None], skip: int, length: int) -> None:
    """Put the pages of a range behind the runs, `skip` bytes into the first of them."""
    for frame in found:
        assert frame is not None
        nbytes = min(page_size - skip, length)
        address = frame * page_size + skip
        if runs and runs[-1].address + runs[-1].length == address:
            runs[-1] = PhysicalSegment(runs[-1].address, runs[-1].length + nbytes)
        else:
            runs.append(PhysicalSegment(address, nbytes))
        length, skip = length - nbytes, 0


def resident_pages(task: Task, address: int, length: int) -> int:
    """Count the base pages of a range that are in memory and in the task's page table.

    Shared memory that the task has not touched may be in memory and does not count.
    Linux: as `pagemap`; no CAP_SYS_ADMIN.
    """
    return sum(entry >> 63 for chunk in _chunks(task, address, length) for entry in chunk)


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether two ranges, each of a task, are the same memory, and what shows it.

    Attributes
    ----------
    same : bool
        True: shown to be the same. False: not shown, see `why`.
    proof : str
        'frames': every page has the same page frame on both sides. 'object': both ranges are
        shared mappings of the same offsets of the same VM object.
    denied : str
        Why the frames were not what decided; empty where they were.
    why : str
        What differs; empty where `same`.
    """

    same: bool
    proof: Literal["frames", "object"]
    denied: str
    why: str

    def __bool__(self) -> bool:
        return self.same


def same_pages(task_a: Task, address_a: int, task_b: Task, address_b: int, length: int) -> Proof:
    """Show whether two ranges are the same memory, by the strongest proof that is to be had.

    First the page frames, if this process may read them and all pages are present on both sides.
    Otherwise device, inode and offset of the VM objects, for which nothing need be present. Equal
    frames of private pages (left by fork, or the zero page) prove nothing and are not taken.

    Raises
    ------
    TaskGoneError
        One of the tasks has ended (ESRCH).
    NotPrivilegedError
        Not even the maps of both tasks may be read (EACCES).
    """
    check_range(address_a, length)
    check_range(address_b, length)
    try:
        decided = _compare_frames(task_a, address_a, task_b, address_b, length)
    except NotPrivilegedError as error:
        return _compare_objects(task_a, address_a, task_b, address_b, length, str(error))
    if isinstance(decided, Proof):
        return decided
    return _compare_objects(task_a, address_a, task_b, address_b, length, decided)


def _compare_frames(
    task_a: Task, address_a: int, task_b: Task, address_b: int, length: int
) -> Proof | str:
    """Decide by frames, or say why they can not."""
    why = ""
    for _ in range(_ATTEMPTS):
        entries_a = pagemap(task_a, address_a, length)
        entries_b = pagemap(task_b, address_b, length)
        frames_a = _frames_of(entries_a, task_a)
        frames_b = _frames_of(entries_b, task_b)
        for task, found in ((task_a, frames_a), (task_b, frames_b)):
            if None in found:
                return (
                    f"{found.count(None)} of {len(found)} pages are not present in task {task.pid}"
                )
        if address_a % page_size != address_b % page_size:
            return Proof(False, "frames", "", "the ranges begin at different offsets in a page")
        why = _frames_differ(entries_a, entries_b)
        if not why:
            return Proof(True, "frames", "", "")
    return Proof(False, "frames", "", why)


def _frames_differ(entries_a: array[int], entries_b: array[int]) -> str:
    for index, (a, b) in enumerate(zip(entries_a, entries_b, strict=True)):
        if (a ^ b) & _FRAME:
            return f"page {index} is frame {a & _FRAME:#x} in one and {b & _FRAME:#x} in the other"
        if not a & b & _FILE_OR_SHARED:
            return f"page {index} is private: the tasks part at the next store"
    return ""


def _compare_objects(
    task_a: Task, address_a: int, task_b: Task, address_b: int, length: int, denied: str
) -> Proof:
    a = _extents(task_a, address_a, length)
    b = _extents(task_b, address_b, length)
    why = ""
    if isinstance(a, str):
        why = a
    elif isinstance(b, str):
        why = b
    elif a != b:
        why = "the ranges are not the same offsets of the same objects"
    return Proof(not why, "object", denied, why)


def _extents(task: Task, address: int, length: int) -> list[tuple[object, int, int]] | str:
    """Give a range as (object, offset, length) in order, joined; or say why it is none."""
    mapped = regions_in(task, address, length)
    if find_holes(mapped, address, length):
        return f"part of the range is not mapped in task {task.pid}"
    found: list[tuple[object, int, int]] = []
    for region in mapped:
        identity = region.object.identity
        if not region.shared or identity is None:
            return f"the memory at {region.start:#x} is private to task {task.pid}"
        offset, size = _part(region, address, length)
        if found and found[-1][0] == identity and found[-1][1] + found[-1][2] == offset:
            offset, size = found[-1][1], found.pop()[2] + size
        found.append((identity, offset, size))
    return found


def _part(region: Region, address: int, length: int) -> tuple[int, int]:
    start = max(region.start, address)
    return region.offset_of(start), min(region.end, address + length) - start
