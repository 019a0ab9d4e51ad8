"""The tasks that copy for us, and which means a copy from or to a task takes."""

from __future__ import annotations

import errno
import threading
from enum import Enum
from typing import Protocol

from memdesc import _core
from memdesc.copyio.transfer import explain
from memdesc.errors import InvalidArgument
from memdesc.vm.task import Task, key_of


class Route(Enum):
    """The means by which bytes are copied from and to a task."""

    PROCESS_VM = "process_vm_readv and process_vm_writev"
    CONNECTION = "a connection, over which the task itself copies"


class Copier(Protocol):
    """Copies from and to one task's memory by other means than this process's own rights.

    Both methods give the bytes copied before the first address that can not be reached, all of
    them if there is none, and raise errors of the family for all else.
    """

    def read(self, address: int, buffer: memoryview) -> int:
        """Fill `buffer` from `address` of the task."""

    def write(self, address: int, data: memoryview) -> int:
        """Store `data` at `address` of the task."""


# By key: a Task may be another connection's, whose pidfd it would hold.
_copiers: dict[tuple[int, int], dict[int, Copier]] = {}
# Reentrant: the collector may end a dropped connection, and unregister its copier, at any moment.
# So only `register_copier`, which it never calls, takes an inner dict out, and none is replaced.
_copiers_lock = threading.RLock()


def register_copier(task: Task, copier: Copier) -> None:
    """Offer a way to copy for where the kernel denies it; of several the latest is taken."""
    with _copiers_lock:
        for key in [key for key, registered in _copiers.items() if not registered]:
            del _copiers[key]
        _copiers.setdefault(key_of(task), {})[id(copier)] = copier


def renew_lock() -> None:
    """After a fork in the child: another thread of the parent may have held the lock."""
    global _copiers_lock
    _copiers_lock = threading.RLock()


def unregister_copier(task: Task, copier: Copier) -> None:
    """Take the offer back. Copies under way are not waited for.

    Raises
    ------
    InvalidArgument
        It was not registered for that task.
    """
    with _copiers_lock:
        if _copiers.get(key_of(task), {}).pop(id(copier), None) is None:
            raise InvalidArgument(f"{copier!r} is not registered for {task!r}", errno=errno.EINVAL)


def route(task: Task) -> Route:
    """Tell by which means this process can copy from and to a task now.

    It is the kernel's answer to reading one byte at address 0, which it gives whether or not
    anything is there. What a later copy takes is decided anew.

    Raises
    ------
    NotPrivilegedError, UnsupportedError
        There is none (EPERM, ENOSYS).
    TaskGoneError
        The task has ended (ESRCH).
    """
    doing = f"copy from task {task.pid}"
    task.check_alive(doing)
    try:
        _core.process_vm_readv(task.pid, bytearray(1), 0)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS) and copier_of(task) is not None:
            return Route.CONNECTION
        if error.errno != errno.EFAULT:
            raise explain(task, doing, error) from error
    task.check_alive(doing)
    return Route.PROCESS_VM


def copier_of(task: Task) -> Copier | None:
    """Give the copier that stands in for the kernel, if a task has one."""
    with _copiers_lock:
        registered = list(_copiers.get(key_of(task), {}).values())
        return registered[-1] if registered else None
