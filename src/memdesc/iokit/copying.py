"""The model's copies between a task's memory and a buffer here."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from memdesc import copyio, errors
from memdesc.errors import MemdescError
from memdesc.iokit.values import first_bytes
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on


def _errno_of(copy: Callable[[], object]) -> int:
    """Do it and give the errno, 0 for none."""
    try:
        copy()
    except MemdescError as error:
        return error.errno or errno.EINVAL
    return 0


def copyin(uaddr: int, kaddr: Buffer, nbytes: int, task: Task) -> int:
    """Copy from a task's address into a buffer here; give the errno, 0 for none.

    The model is called by the task and so knows it; here it is the last argument.
    """
    into = first_bytes(kaddr, nbytes)
    return _errno_of(lambda: copyio.copyin_into(task, uaddr, into))


def copyout(kaddr: Buffer, uaddr: int, nbytes: int, task: Task) -> int:
    """Copy from a buffer here to a task's address; give the errno, 0 for none."""
    data = first_bytes(kaddr, nbytes)
    return _errno_of(lambda: copyio.copyout(data, task, uaddr))


def copyinstr(uaddr: int, kaddr: Buffer, nbytes: int, done: list[int] | None, task: Task) -> int:
    """Copy a string in with its NUL; give the errno, 0 for none.

    `done` gets the bytes copied: with the NUL, or all of `nbytes` at ENAMETOOLONG, else 0.
    """
    into, found, result = first_bytes(kaddr, nbytes), b"", 0
    try:
        found = copyio.copyinstr(task, uaddr, nbytes) + b"\0"
    except errors.StringTooLongError as error:
        found, result = error.data, errno.ENAMETOOLONG
    except MemdescError as error:
        result = error.errno or errno.EINVAL
    into[: len(found)] = found
    if done is not None:
        done.append(len(found))
    return result
