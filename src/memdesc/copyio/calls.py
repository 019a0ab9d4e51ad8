"""copyin, copyout and copyinstr."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from memdesc import _core
from memdesc.copyio.copiers import copier_of
from memdesc.copyio.transfer import (
    SMALLEST_MAPPED,
    STEP,
    bytes_of,
    check_place,
    check_size,
    place_in,
    timed,
    transfer,
)
from memdesc.errors import AllocationError, CopyError, InvalidArgument, StringTooLongError
from memdesc.memory.limits import check_available
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task, check_task
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it since 3.12

_T = TypeVar("_T")


def copyin(task: Task, address: int, nbytes: int, *, timeout: float | None = None) -> bytes:
    """Copy `nbytes` bytes at an address of a task into this process.

    Parameters
    ----------
    task : Task
        Whose address it is; the own task too.
    address : int
        In the task's address space.
    nbytes : int
        0 or more. With 0 nothing is looked at, neither address nor task.
    timeout : float, optional
        Seconds; None waits as long as the kernel does, which the task decides: see Notes.

    Returns
    -------
    bytes
        The bytes as they were, page by page: what the task stores meanwhile may be in them in
        part.

    Raises
    ------
    CopyError
        Part of the range can not be read (EFAULT); `completed` bytes before it could.
    TaskGoneError
        The task has ended, or ended during the copy (ESRCH).
    NotPrivilegedError
        The kernel denies this process the task's memory, and no connection stands in (EPERM).
    UnsupportedError
        process_vm_readv is filtered away, and no connection stands in (ENOSYS).
    TimedOutError
        It took longer than `timeout`, or the task holds up an earlier copy or look (ETIMEDOUT).
    AllocationError
        No room for so many bytes here (ENOMEM); with `timeout`, no thread (EAGAIN).
    InvalidArgument
        A negative number of bytes or address.

    Notes
    -----
    Linux: process_vm_readv. Needs the task's own user, no less capabilities than it has, a
    dumpable task and yama 0 (with 1 the task must be a descendant), or CAP_SYS_PTRACE.
    Containers may filter it. There is no largest size (XNU: 64 MiB, EINVAL).

    A task can hold the copy up: its page lies in a file system that does not answer (FUSE), waits
    for a userfaultfd, or it keeps the lock on its address space. Only SIGKILL ends that wait. So
    with `timeout` a thread of its own copies, which is given up and ends when the task lets go.

    I/O Kit: `copyin`.

    Examples
    --------
    >>> from memdesc._core import buffer_address
    >>> word = bytearray(b"here")
    >>> copyin(Task.current(), buffer_address(word)[0], 4)
    b'here'
    """
    size = check_size(nbytes, "nbytes")
    check_timeout(timeout)
    if size == 0:
        return b""
    if timeout is None:
        return _copied(task, address, size)
    return timed(
        timeout,
        [task],
        f"copy {size:,} bytes in",
        lambda until: _copied(task, address, size, until),
    )


def _copied(task: Task, address: int, size: int, until: float | None = None) -> bytes:
    doing = f"copy {size:,} bytes in"
    # The one way in plain Python to fill a bytes object in place: nothing is copied twice.
    target = _room(lambda: io.BytesIO(bytes(size)), size, doing)
    with target.getbuffer() as view:
        _read(task, address, view, f"{doing} from", until)
    return target.getvalue()


def _room(make: Callable[[], _T], size: int, doing: str) -> _T:
    """Make room for so many bytes."""
    if size > STEP:
        check_available(size, doing)  # where memory runs out Linux kills instead of failing
    try:
        return make()
    except MemoryError as error:
        raise AllocationError(
            f"cannot {doing}: there is no room for them here", errno=errno.ENOMEM, requested=size
        ) from error


def copyin_into(task: Task, address: int, buffer: Buffer, *, timeout: float | None = None) -> int:
    """Copy from an address of a task into a buffer here, as many bytes as the buffer has.

    Bytes before a fault stay in the buffer. A buffer that overlaps the range copied (of the own
    task) ends with unspecified contents. Raises as `copyin` does.

    Parameters
    ----------
    task : Task
        Whose address it is.
    address : int
        In the task's address space.
    buffer : buffer
        Writable and contiguous.
    timeout : float, optional
        As of `copyin`. It costs memory of the same size, and one copy more: what comes later must
        not go into the buffer.

    Returns
    -------
    int
        Bytes copied: all of them.
    """
    with bytes_of(buffer) as view:
        if view.readonly:
            raise InvalidArgument(
                "cannot copy in: the buffer is read-only; give a writable one", errno=errno.EINVAL
            )
        check_timeout(timeout)
        doing = f"copy {len(view):,} bytes in from"
        if timeout is None:
            return _read(task, address, view, doing)
        return _read_in_time(task, address, view, doing, timeout)


def _read_in_time(task: Task, address: int, view: memoryview, doing: str, timeout: float) -> int:
    room = _room(lambda: memoryview(bytearray(len(view))), len(view), doing)
    try:
        timed(timeout, [task], doing, lambda until: _read(task, address, room, doing, until))
    except CopyError as error:
        view[: error.completed] = room[: error.completed]
        raise
    view[:] = room
    return len(view)


def copyout(data: Buffer, task: Task, address: int, *, timeout: float | None = None) -> int:
    """Copy the bytes of a buffer here to an address of a task.

    Bytes before a fault stay written. Raises as `copyin` does; EFAULT also for memory that the
    task has mapped read-only. What it writes to privately mapped memory only the task sees.
    After `TimedOutError` some bytes are written or none, and up to 64 MiB may be later.

    Parameters
    ----------
    data : buffer
        Contiguous. If empty, nothing is looked at.
    task : Task
        Whose address it is.
    address : int
        In the task's address space.
    timeout : float, optional
        As of `copyin`. It costs a copy of the data, which is what is written later, if it is.

    Returns
    -------
    int
        Bytes copied: all of them.

    Notes
    -----
    Linux: process_vm_writev, privileges as for `copyin`. I/O Kit: `copyout`.

    Examples
    --------
    >>> from memdesc._core import buffer_address
    >>> word = bytearray(4)
    >>> copyout(b"here", Task.current(), buffer_address(word)[0]), word
    (4, bytearray(b'here'))
    """
    check_task(task)
    check_timeout(timeout)
    with bytes_of(data) as view:
        place = check_place(task, address, len(view), doing := f"copy {len(view):,} bytes out to")
        doing = place_in(doing, task, place)
        if timeout is None or not view:
            return _write(task, place, view, doing)
        kept = _room(lambda: memoryview(bytes(view)), len(view), doing)
    return timed(timeout, [task], doing, lambda until: _write(task, place, kept, doing, until))


def _write(task: Task, place: int, view: memoryview, doing: str, until: float | None = None) -> int:
    copier = copier_of(task)
    return transfer(
        task,
        place,
        view,
        lambda at, part: _core.process_vm_writev(task.pid, part, at),
        copier.write if copier else None,
        doing,
        until,
    )


def copyinstr(task: Task, address: int, maximum: int, *, timeout: float | None = None) -> bytes:
    """Copy a string that ends with NUL from an address of a task.

    Only the pages that the string touches are read, so a short string at the end of a mapping
    is found also with a large `maximum` (XNU looks at the whole range first: EFAULT).

    Parameters
    ----------
    task : Task
        Whose address it is.
    address : int
        Of the first byte, in the task's address space.
    maximum : int
        The most bytes to look at, with the NUL; 0 or more.
    timeout : float, optional
        As of `copyin`.

    Returns
    -------
    bytes
        The string without its NUL.

    Raises
    ------
    StringTooLongError
        No NUL within `maximum` bytes (ENAMETOOLONG); `data` has those bytes.
    CopyError
        Memory that can not be read came before the NUL (EFAULT); `completed` counts the bytes
        before it (XNU on arm64 tells 0). Others as `copyin`.

    Notes
    -----
    I/O Kit: `copyinstr`.

    Examples
    --------
    >>> from memdesc._core import buffer_address
    >>> text = bytearray(b"name") + bytes(9)
    >>> copyinstr(Task.current(), buffer_address(text)[0], 64)
    b'name'
    """
    most = check_size(maximum, "maximum")
    check_timeout(timeout)
    if timeout is None:
        return _string(task, address, most)
    doing = f"copy a string in from task {task.pid}"
    return timed(timeout, [task], doing, lambda until: _string(task, address, most, until))


def _string(task: Task, address: int, most: int, until: float | None = None) -> bytes:
    found = bytearray()
    while len(found) < most:
        doing = "copy a string in from"
        place = check_place(task, address, len(found) + 1, doing, expected=most) + len(found)
        part = bytearray(min(page_size - place % page_size, most - len(found)))
        try:
            with memoryview(part) as view:
                _read(task, place, view, doing, until)
        except CopyError as error:
            raise CopyError(
                f"{error}; {len(found):,} bytes without a NUL came before",
                expected=most,
                completed=len(found),
                pid=error.pid,
                address=error.address,
                errno=error.errno,
            ) from error
        end = part.find(0)
        if end >= 0:
            return bytes(found + part[:end])
        found += part
    raise StringTooLongError(
        f"cannot copy a string in from task {task.pid}: no NUL within {most:,} bytes; give a "
        "larger maximum",
        expected=most,
        completed=most,
        errno=errno.ENAMETOOLONG,
        data=bytes(found),
    )


def _read(
    task: Task, address: int, view: memoryview, doing: str, until: float | None = None
) -> int:
    check_task(task)
    place = check_place(task, address, len(view), doing)
    if len(view) >= SMALLEST_MAPPED:
        from memdesc.copyio.by_mapping import copy_by_mapping

        if copy_by_mapping(task, place, view):
            return len(view)
    copier = copier_of(task)
    return transfer(
        task,
        place,
        view,
        lambda at, part: _core.process_vm_readv(task.pid, part, at),
        copier.read if copier else None,
        place_in(doing, task, place),
        until,
    )
