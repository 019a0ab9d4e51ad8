"""copyin of large blocks through a mapping, where that takes less time: `crossing` decides.

Only where nobody can take the pages away, as a load from a page that is gone is a signal and not
an error: shared anonymous memory, which no one can truncate, or an object sealed against
shrinking and against writing by others (who may write may also punch holes). Never for copyout:
another task's memory is not written through a mapping.
"""

from __future__ import annotations

import fcntl
import os

from memdesc import _core
from memdesc.copyio.transfer import STEP
from memdesc.crossing import Way, way_to_copy
from memdesc.errors import MappingError, NotPrivilegedError
from memdesc.memory.memfd import anonymous_device, memory_devices
from memdesc.vm.objects import open_object
from memdesc.vm.pages import Access, page_size, page_span
from memdesc.vm.regions import ObjectKind, Region, regions_in
from memdesc.vm.task import Task

_KINDS = (ObjectKind.SHARED_ANONYMOUS, ObjectKind.MEMFD, ObjectKind.HUGETLB)


def copy_by_mapping(task: Task, address: int, view: memoryview) -> bool:
    """Fill `view` from a mapping of the task's memory, or give False: then the kernel copies.

    Raises
    ------
    TaskGoneError
        The task has ended (ESRCH).
    """
    if way_to_copy(len(view), mappable=True).way is not Way.MAPPING:
        return False
    window = _map(task, address, len(view))
    if window is None:
        return False
    with memoryview(window) as source:
        for done in range(0, len(view), STEP):  # signals are honoured in between
            with view[done : done + STEP] as into, source[done : done + STEP] as part:
                _core.copy_memory(into, part)
    task.check_alive(f"copy {len(view):,} bytes in from task {task.pid}")
    return True


def _map(task: Task, address: int, nbytes: int) -> _core.Window | None:
    """Map a range of a task, or give None where that can not be done, or not safely."""
    try:
        found = regions_in(task, address, nbytes)
        if len(found) != 1 or not _suits(found[0], address, nbytes):
            return None
        fd = open_object(task, found[0], Access.READ_ONLY)
    except (NotPrivilegedError, MappingError):
        return None
    try:
        return _map_object(fd, found[0], address, nbytes)
    except OSError:  # no seals, no room, no pages: the kernel's copy says what is wrong, if any
        return None
    finally:
        os.close(fd)


def _suits(region: Region, address: int, nbytes: int) -> bool:
    whole = region.start <= address and address + nbytes <= region.end
    is_memory = region.object.kind in _KINDS and (
        os.makedev(*region.object.device) in memory_devices()  # the name can be any
    )
    return whole and region.shared and region.readable and is_memory


def _map_object(fd: int, region: Region, address: int, nbytes: int) -> _core.Window | None:
    status = os.fstat(fd)
    same = (status.st_dev, status.st_ino) == (
        os.makedev(*region.object.device),
        region.object.inode,
    )
    offset = region.offset_of(address)
    if not same or offset + nbytes > status.st_size or not _stays(fd, status, region):
        return None
    page = max(status.st_blksize, page_size)
    start, span = page_span(offset, nbytes, page)
    memory = _core.map_memory(0, span, _core.PROT_READ, _core.MAP_SHARED, fd, start)
    if page > page_size:  # a huge page that is missing is an error here, not a signal later
        _core.madvise(memory.address, span, _core.MADV_POPULATE_READ)
    return _core.Window(memory, offset - start, nbytes, False)


def _stays(fd: int, status: os.stat_result, region: Region) -> bool:
    """Whether no one can take a page of the object away."""
    # The name alone does not tell, nor does the device: memfds are on the same one.
    named_so = region.object.kind is ObjectKind.SHARED_ANONYMOUS
    if named_so and status.st_dev == anonymous_device() and status.st_blksize == page_size:
        return True
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    unwritable = _core.F_SEAL_WRITE | _core.F_SEAL_FUTURE_WRITE
    return bool(seals & _core.F_SEAL_SHRINK and seals & unwritable)
