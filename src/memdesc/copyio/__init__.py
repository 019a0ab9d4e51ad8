"""Copying between a buffer here and an address in a task, either way: copyin and copyout.

The kernel copies (process_vm_readv, process_vm_writev), so an address is never dereferenced in
the wrong space, and memory that can not be reached is an error, never a signal. Where the
kernel denies this process the other one's memory, a task that is connected with us may copy
for us: the room above registers a `Copier` for it. `route` tells which of the two it would be.

Protections hold: what the task itself may not read can not be copied in (also memory that is
mapped for writing only, which its processor could read), and read-only memory can not be
written. Pages that are not there yet are brought in. Device memory (VM_IO) can not be reached.

A task that ended has no memory, and its pid may be given to another process. So the task is
looked at after each copy, too: data that may be a stranger's is never returned.
"""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memdesc import _core
from memdesc.errors import (
    AllocationError,
    CopyError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    StringTooLongError,
    TaskGoneError,
    UnsupportedError,
    describe_errno,
)
from memdesc.memory.limits import check_available
from memdesc.vm.pages import check_integer, page_size
from memdesc.vm.task import Task, check_task

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it since 3.12

__all__ = [
    "Copier",
    "Route",
    "copyin",
    "copyin_into",
    "copyinstr",
    "copyout",
    "register_copier",
    "route",
    "unregister_copier",
]

_STEP = 64 << 20
"""Bytes copied per call: signals are honoured in between, and the kernel takes at most 2 GiB."""

_END = 1 << 63
"""No 64-bit Linux gives a task addresses from here on: they are the kernel's."""

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


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


_copiers: dict[Task, list[Copier]] = {}
# Reentrant: the collector may end a dropped connection, and unregister its copier, at any moment.
_copiers_lock = threading.RLock()

_Move = Callable[[int, memoryview], int]


def register_copier(task: Task, copier: Copier) -> None:
    """Offer a way to copy for where the kernel denies it; of several the latest is taken."""
    with _copiers_lock:
        _copiers.setdefault(task, []).append(copier)


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
        left = [one for one in _copiers.get(task, ()) if one is not copier]
        if len(left) == len(_copiers.get(task, ())):
            raise InvalidArgument(f"{copier!r} is not registered for {task!r}")
        if left:
            _copiers[task] = left
        else:
            del _copiers[task]


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
        if error.errno in (errno.EPERM, errno.ENOSYS) and _copier(task) is not None:
            return Route.CONNECTION
        if error.errno != errno.EFAULT:
            raise _explain(task, doing, error) from error
    task.check_alive(doing)
    return Route.PROCESS_VM


def copyin(task: Task, address: int, nbytes: int) -> bytes:
    """Copy `nbytes` bytes at an address of a task into this process.

    Parameters
    ----------
    task : Task
        Whose address it is; the own task too.
    address : int
        In the task's address space.
    nbytes : int
        0 or more. With 0 nothing is looked at, neither address nor task.

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
    AllocationError
        No room for so many bytes here (ENOMEM).
    InvalidArgument
        A negative number of bytes or address.

    Notes
    -----
    Linux: process_vm_readv. Needs the task's own user, no less capabilities than it has, a
    dumpable task and yama 0 (with 1 the task must be a descendant), or CAP_SYS_PTRACE.
    Containers may filter it. There is no largest size (XNU: 64 MiB, EINVAL).

    I/O Kit: `copyin`.

    Examples
    --------
    >>> from memdesc._core import buffer_address
    >>> word = bytearray(b"here")
    >>> copyin(Task.current(), buffer_address(word)[0], 4)
    b'here'
    """
    size = _check_size(nbytes, "nbytes")
    if size == 0:
        return b""
    doing = f"copy {size:,} bytes in"
    if size > _STEP:
        check_available(size, doing)  # where memory runs out Linux kills instead of failing
    try:
        # The one way in plain Python to fill a bytes object in place: nothing is copied twice.
        target = io.BytesIO(bytes(size))
    except MemoryError as error:
        raise AllocationError(
            f"cannot {doing}: there is no room for them here", errno=errno.ENOMEM, requested=size
        ) from error
    with target.getbuffer() as view:
        _read(task, address, view, f"{doing} from")
    return target.getvalue()


def copyin_into(task: Task, address: int, buffer: Buffer) -> int:
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

    Returns
    -------
    int
        Bytes copied: all of them.
    """
    with bytes_of(buffer) as view:
        if view.readonly:
            raise InvalidArgument("cannot copy in: the buffer is read-only; give a writable one")
        return _read(task, address, view, f"copy {len(view):,} bytes in from")


def copyout(data: Buffer, task: Task, address: int) -> int:
    """Copy the bytes of a buffer here to an address of a task.

    Bytes before a fault stay written. Raises as `copyin` does; EFAULT also for memory that the
    task has mapped read-only. What it writes to privately mapped memory only the task sees.

    Parameters
    ----------
    data : buffer
        Contiguous. If empty, nothing is looked at.
    task : Task
        Whose address it is.
    address : int
        In the task's address space.

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
    with bytes_of(data) as view:
        place = _check_place(address, len(view), doing := f"copy {len(view):,} bytes out to")
        doing = _place_in(doing, task, place)
        copier = _copier(task)
        return _transfer(
            task,
            place,
            view,
            lambda at, part: _core.process_vm_writev(task.pid, part, at),
            copier.write if copier else None,
            doing,
        )


def copyinstr(task: Task, address: int, maximum: int) -> bytes:
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
    most = _check_size(maximum, "maximum")
    found = bytearray()
    while len(found) < most:
        doing = "copy a string in from"
        place = _check_place(address, len(found) + 1, doing, expected=most) + len(found)
        part = bytearray(min(page_size - place % page_size, most - len(found)))
        try:
            with memoryview(part) as view:
                _read(task, place, view, doing)
        except CopyError as error:
            raise CopyError(
                f"{error}; {len(found):,} bytes without a NUL came before",
                expected=most,
                completed=len(found),
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


def _read(task: Task, address: int, view: memoryview, doing: str) -> int:
    check_task(task)
    place = _check_place(address, len(view), doing)
    copier = _copier(task)
    return _transfer(
        task,
        place,
        view,
        lambda at, part: _core.process_vm_readv(task.pid, part, at),
        copier.read if copier else None,
        _place_in(doing, task, place),
    )


def _transfer(
    task: Task, address: int, view: memoryview, move: _Move, instead: _Move | None, doing: str
) -> int:
    """Move all of `view` by `move`, or by `instead` if the kernel refuses the first move."""
    total, done = len(view), 0
    if total == 0:
        return 0
    task.check_alive(doing)
    while done < total:
        try:
            with view[done : done + _STEP] as part:
                moved = move(address + done, part)
        except MemdescError:  # a copier's own word
            raise
        except OSError as error:
            if done == 0 and instead and error.errno in (errno.EPERM, errno.ENOSYS):
                move, instead = instead, None
                continue
            raise _explain(task, doing, error, total, done) from error
        if moved <= 0:
            raise _fault(doing, total, done)
        # The count is short where a page could not be reached: the next call says so itself.
        done += moved
    task.check_alive(doing)
    return done


def _explain(
    task: Task, doing: str, error: OSError, expected: int = 0, completed: int = 0
) -> MemdescError:
    """Say what the kernel's answer to process_vm_readv or process_vm_writev means."""
    if error.errno == errno.ESRCH or not task.alive:
        return TaskGoneError(f"cannot {doing}: the task has ended", errno=errno.ESRCH)
    if error.errno == errno.EFAULT:
        return _fault(doing, expected, completed)
    told = f"cannot {doing}: {describe_errno(error)}"
    if error.errno == errno.EPERM:
        return NotPrivilegedError(
            f"{told}; it takes the task's own user (here {task.credentials.uid}) with no "
            f"capability less than the task has{_yama()}, or CAP_SYS_PTRACE; a task connected "
            "with this one would copy by itself",
            errno=errno.EPERM,
        )
    if error.errno == errno.ENOSYS:
        return UnsupportedError(
            f"{told}: a filter hides the call from this process (Linux has it since 3.2); let it "
            "through, or connect with the task, which then copies by itself",
            errno=errno.ENOSYS,
        )
    if error.errno == errno.ENOMEM:
        return AllocationError(f"{told}: the kernel is out of memory", errno=errno.ENOMEM)
    return MemdescError(told, errno=error.errno)


def _fault(doing: str, expected: int, completed: int) -> CopyError:
    return CopyError(
        f"cannot {doing}: {completed:,} of {expected:,} bytes were copied, the next can not be "
        "reached: not mapped there, or protected; look at the task's maps",
        expected=expected,
        completed=completed,
        errno=errno.EFAULT,
    )


def _yama() -> str:
    try:
        scope = _YAMA.read_text().strip()
    except OSError:  # no yama in this kernel
        return ""
    return "" if scope == "0" else f" and kernel.yama.ptrace_scope 0 (it is {scope})"


def _copier(task: Task) -> Copier | None:
    with _copiers_lock:
        registered = _copiers.get(task)
        return registered[-1] if registered else None


def _place_in(doing: str, task: Task, address: int) -> str:
    return f"{doing} {address:#x} of task {task.pid}"


def _check_size(value: int, what: str) -> int:
    size = check_integer(value, what)
    if size < 0:
        raise InvalidArgument(f"{what} is {size}: give 0 or more bytes")
    return size


def _check_place(address: int, nbytes: int, doing: str, expected: int | None = None) -> int:
    """Give the address if `nbytes` from there are below the kernel's, before any byte moves."""
    if nbytes == 0:
        return 0
    try:
        place = address.__index__()
    except AttributeError:
        kind = type(address).__name__
        raise InvalidArgument(f"address is of type {kind}: give an integer") from None
    if place < 0:
        raise InvalidArgument(f"address is {place}: addresses are 0 or more")
    if place + nbytes > _END:
        raise CopyError(
            f"cannot {doing} {place:#x}: the range goes past the addresses that a task can have",
            expected=nbytes if expected is None else expected,
            errno=errno.EFAULT,
        )
    return place


def bytes_of(buffer: Buffer) -> memoryview:
    """Give a buffer as plain bytes; the caller releases the view."""
    try:
        view = memoryview(buffer)
        return view.cast("B") if view.nbytes else memoryview(bytearray())
    except TypeError as error:
        raise InvalidArgument(
            f"{type(buffer).__name__} gives no contiguous bytes: {error}"
        ) from error
