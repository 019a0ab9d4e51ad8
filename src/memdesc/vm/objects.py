"""Opening the VM object behind a region of a task: by map_files, else by its own descriptor.

Two rungs, tried in this order; both give an open file description of our own.
* /proc/PID/map_files/START-END, which opens the object itself, whatever its name: needs
  CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
* pidfd_getfd of a descriptor that the task holds on the object: needs ptrace rights (same user,
  or CAP_SYS_PTRACE) and that the task has kept one; shared anonymous memory has none.
"""

from __future__ import annotations

import errno
import os

from memdesc import _core
from memdesc.errors import MappingError, MappingReason, NotPrivilegedError
from memdesc.vm.pages import Access
from memdesc.vm.patience import look_at
from memdesc.vm.regions import Region
from memdesc.vm.task import Task


def open_object(task: Task, region: Region, access: Access) -> int:
    """Open the object behind a shared region; the caller closes the descriptor.

    Raises
    ------
    NotPrivilegedError
        Both rungs are denied (EPERM, EACCES).
    TaskGoneError
        The task has ended.
    MappingError
        NOT_MAPPED: something else lies there by now (EAGAIN).
    TimedOutError
        It holds up whoever looks at it, or who serves the file does (ETIMEDOUT).
    """
    doing = f"open the object at {region.start:#x}"
    fd = look_at(task, doing, lambda: _open(task, region, access), undo=os.close)
    task.check_alive(doing)
    return fd


def _open(task: Task, region: Region, access: Access) -> int:
    flags = (os.O_RDWR if access.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    denied: list[str] = []
    link = task.proc_path(f"map_files/{region.start:x}-{region.end:x}")
    try:
        handle = os.open(link, os.O_PATH | os.O_CLOEXEC)
        try:
            return _open_again(task, region, handle, flags)
        finally:
            os.close(handle)
    except MappingError:
        raise
    except OSError as error:
        denied.append(f"map_files: {errno.errorcode.get(error.errno or 0)}")
        return _through_descriptor(task, region, flags, denied)


def _open_again(task: Task, region: Region, handle: int, flags: int) -> int:
    """Open what a handle refers to, if it is what was seen: of anything else opening can hang."""
    if _core.stat_cached(handle, b"")[:2] != _identity(region):
        raise MappingError(
            f"what lies at {region.start:#x} of task {task.pid} changed while it was being "
            "opened: try again",
            reason=MappingReason.NOT_MAPPED,
            errno=errno.EAGAIN,
        )
    return os.open(f"/proc/self/fd/{handle}", flags)


def _identity(region: Region) -> tuple[int, int]:
    return os.makedev(*region.object.device), region.object.inode


def _through_descriptor(task: Task, region: Region, flags: int, denied: list[str]) -> int:
    """Borrow the task's own descriptor on the object, and open that once more."""
    number = _descriptor_on(task, region, denied)
    if number is not None:
        try:
            borrowed = _core.pidfd_getfd(task.fileno(), number)
        except OSError as error:
            denied.append(f"pidfd_getfd: {errno.errorcode.get(error.errno or 0)}")
        else:
            try:
                return _open_again(task, region, borrowed, flags)
            except MappingError:
                raise
            except OSError as error:
                denied.append(f"re-opening: {errno.errorcode.get(error.errno or 0)}")
            finally:
                os.close(borrowed)
    task.check_alive(f"open the object at {region.start:#x}")
    raise NotPrivilegedError(
        f"the object behind {region.start:#x}-{region.end:#x} of task {task.pid} can not be "
        f"opened ({'; '.join(denied)}): run with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, or use "
        "copyin and copyout",
        errno=errno.EPERM,
    )


def _descriptor_on(task: Task, region: Region, denied: list[str]) -> int | None:
    """The number of a descriptor of the task on that object, if it has one that we may see."""
    folder = task.proc_path("fd")
    try:
        numbers = os.listdir(folder)
    except OSError as error:
        denied.append(f"its descriptors: {errno.errorcode.get(error.errno or 0)}")
        return None
    for number in numbers:
        try:
            found = _core.stat_cached(-1, f"{folder}/{number}".encode())
        except OSError:
            continue  # closed since the listing, or not ours to look at: then it is not the one
        if found[:2] == _identity(region):
            return int(number)
    denied.append("the task keeps no descriptor on it")
    return None
