"""Moving bytes in steps, the checks before it, and what the kernel's answers mean."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from memdesc.errors import (
    AllocationError,
    CopyError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
    TimedOutError,
    UnsupportedError,
    describe_errno,
)
from memdesc.vm.pages import check_integer
from memdesc.vm.patience import within
from memdesc.vm.proc import read_text
from memdesc.vm.task import Task, check_task

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it since 3.12

STEP = 64 << 20
"""Bytes copied per call: signals are honoured in between, and the kernel takes at most 2 GiB."""

SMALLEST_MAPPED = 1 << 20
"""Bytes; below, finding the object costs more than any copy, and no threshold is looked at."""

_T = TypeVar("_T")
_END = 1 << 63
"""No 64-bit Linux gives a task addresses from here on: they are the kernel's."""

_YAMA = "/proc/sys/kernel/yama/ptrace_scope"

Move = Callable[[int, memoryview], int]
"""Copies some bytes at an address of a task, and gives how many."""


def transfer(
    task: Task,
    address: int,
    view: memoryview,
    move: Move,
    instead: Move | None,
    doing: str,
    until: float | None = None,
) -> int:
    """Move all of `view` by `move`, or by `instead` if the kernel refuses the first move.

    After that time (`time.monotonic`) nothing is moved any more: nobody waits for it.
    """
    total, done = len(view), 0
    if total == 0:
        return 0
    task.check_alive(doing)
    while done < total:
        if until is not None and time.monotonic() >= until:
            raise TimedOutError(
                f"cannot {doing}: {done:,} of {total:,} bytes were copied in time",
                errno=errno.ETIMEDOUT,
            )
        try:
            with view[done : done + STEP] as part:
                moved = move(address + done, part)
        except MemdescError:  # a copier's own word
            raise
        except OSError as error:
            if done == 0 and instead and error.errno in (errno.EPERM, errno.ENOSYS):
                move, instead = instead, None
                continue
            raise explain(task, doing, error, total, done, address) from error
        if moved <= 0:
            raise fault(task, doing, total, done, address)
        # The count is short where a page could not be reached: the next call says so itself.
        done += moved
    task.check_alive(doing)
    return done


def timed(timeout: float, tasks: Sequence[Task], doing: str, copy: Callable[[float], _T]) -> _T:
    """Have a thread copy that is given up after so many seconds; `copy` is given when that is."""
    for task in tasks:
        check_task(task)
    until = time.monotonic() + timeout
    return within(timeout, tasks, doing, lambda: copy(until))


def explain(
    task: Task,
    doing: str,
    error: OSError,
    expected: int = 0,
    completed: int = 0,
    address: int = 0,
) -> MemdescError:
    """Say what the kernel's answer to process_vm_readv or process_vm_writev means."""
    if error.errno == errno.ESRCH or not task.alive:
        return TaskGoneError(f"cannot {doing}: task {task.pid} has ended", errno=errno.ESRCH)
    if error.errno == errno.EFAULT:
        return fault(task, doing, expected, completed, address)
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


def fault(task: Task, doing: str, expected: int, completed: int, address: int) -> CopyError:
    """Say that of a copy that began at `address` of the task only so much could be had."""
    return CopyError(
        f"cannot {doing}: {completed:,} of {expected:,} bytes were copied, the next can not be "
        "reached: not mapped there, or protected; look at the task's maps",
        expected=expected,
        completed=completed,
        pid=task.pid,
        address=address + completed,
        errno=errno.EFAULT,
    )


def _yama() -> str:
    try:
        scope = read_text(_YAMA).strip()
    except OSError:  # no yama in this kernel
        return ""
    return "" if scope == "0" else f" and kernel.yama.ptrace_scope 0 (it is {scope})"


def place_in(doing: str, task: Task, address: int) -> str:
    """Add to what is done the place where."""
    return f"{doing} {address:#x} of task {task.pid}"


def check_size(value: int, what: str) -> int:
    """Give a number of bytes back, 0 or more."""
    size = check_integer(value, what)
    if size < 0:
        raise InvalidArgument(f"{what} is {size}: give 0 or more bytes", errno=errno.EINVAL)
    return size


def check_place(
    task: Task,
    address: int,
    nbytes: int,
    doing: str,
    expected: int | None = None,
    name: str = "address",
) -> int:
    """Give the address if `nbytes` from there are below the kernel's, before any byte moves.

    `name`: the parameter's.
    """
    if nbytes == 0:
        return 0
    try:
        place = address.__index__()
    except AttributeError:
        kind = type(address).__name__
        raise InvalidArgument(
            f"{name} is of type {kind}: give an integer", errno=errno.EINVAL
        ) from None
    if place < 0:
        raise InvalidArgument(f"{name} is {place}: addresses are 0 or more", errno=errno.EINVAL)
    if place + nbytes > _END:
        raise CopyError(
            f"cannot {doing} {place:#x}: the range goes past the addresses that a task can have",
            expected=nbytes if expected is None else expected,
            pid=task.pid,
            address=place,
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
            f"{type(buffer).__name__} gives no contiguous bytes: give bytes (of text, "
            f"text.encode()), an array, a descriptor or another buffer ({error})",
            errno=errno.EINVAL,
        ) from error
