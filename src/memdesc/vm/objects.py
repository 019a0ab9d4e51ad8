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
from memdesc.errors import NotPrivilegedError
from memdesc.vm.pages import Access
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
    """
    flags = (os.O_RDWR if access.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    denied: list[str] = []
    link = task.proc_path(f"map_files/{region.start:x}-{region.end:x}")
    try:
        fd = os.open(link, flags)
    except OSError as error:
        denied.append(f"map_files: {errno.errorcode.get(error.errno or 0)}")
        fd = _through_descriptor(task, region, flags, denied)
    task.check_alive(f"open the object at {region.start:#x}")
    return fd


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
                return os.open(f"/proc/self/fd/{borrowed}", flags)
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
    device = os.makedev(*region.object.device)
    folder = task.proc_path("fd")
    try:
        numbers = os.listdir(folder)
    except OSError as error:
        denied.append(f"its descriptors: {errno.errorcode.get(error.errno or 0)}")
        return None
    for number in numbers:
        try:
            status = os.stat(f"{folder}/{number}")
        except OSError:
            continue  # closed since the listing, or not ours to look at: then it is not the one
        if (status.st_dev, status.st_ino) == (device, region.object.inode):
            return int(number)
    denied.append("the task keeps no descriptor on it")
    return None
