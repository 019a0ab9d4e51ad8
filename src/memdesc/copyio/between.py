"""copy_between: from one task's memory to another's, neither of which need be this process."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from memdesc import _core
from memdesc.copyio.copiers import copier_of
from memdesc.copyio.transfer import Move, check_place, check_size, timed, transfer
from memdesc.errors import CopyError, InvalidArgument
from memdesc.vm.task import Task, check_task
from memdesc.vm.telling import bare
from memdesc.vm.timeouts import check_timeout

BOUNCE = 256 << 10
"""Bytes of this process through which all else goes: what fits the processor's second cache.

Measured (docs/copying.md): larger ones are no faster, smaller ones slower; mapping one side
saves nothing; and a second thread that reads ahead saves nothing below 16 MiB.
"""


def copy_between(
    source: Task,
    source_address: int,
    target: Task,
    target_address: int,
    nbytes: int,
    *,
    timeout: float | None = None,
) -> int:
    """Copy `nbytes` bytes at an address of one task to an address of another one.

    Parameters
    ----------
    source, target : Task
        Any two tasks; either may be this process, and both may be the same task.
    source_address, target_address : int
        In the address space of `source` and of `target`.
    nbytes : int
        0 or more. With 0 nothing is looked at, neither addresses nor tasks.
    timeout : float, optional
        As of `copyin`; for a target that is not this process. After `TimedOutError` some bytes are
        written or none, and up to 256 KiB may be later.

    Returns
    -------
    int
        Bytes copied: all of them. Ranges of one task that overlap end as memmove leaves them.
        (Not so the same memory at two addresses, or in two tasks.)

    Raises
    ------
    CopyError
        Part of either range can not be reached (EFAULT); `pid` and `address` say which. The first
        `completed` bytes were copied. Only where the target overlaps the source's end, in one
        task, copying goes from the last byte to the first: then it is the last `completed` bytes,
        and of the block of up to 256 KiB before them some may be.
    TaskGoneError, NotPrivilegedError, UnsupportedError, TimedOutError, InvalidArgument
        As with `copyin`, for either task.

    Notes
    -----
    Linux: process_vm_readv and process_vm_writev in turn, through at most 256 KiB of this process;
    the right to look at both tasks, as for `copyin` and `copyout`, or a connection to them.
    Signals are honoured between the blocks. I/O Kit: none; a driver copies in and out.

    Examples
    --------
    >>> from memdesc._core import buffer_address
    >>> word, room = bytearray(b"here"), bytearray(4)
    >>> here, there = (buffer_address(each)[0] for each in (word, room))
    >>> with Task.current() as task:
    ...     copy_between(task, here, task, there, 4), bytes(room)
    (4, b'here')
    """
    size = check_size(nbytes, "nbytes")
    check_timeout(timeout)
    check_task(source, "source")
    check_task(target, "target")
    if size == 0:
        return 0
    doing = f"copy {size:,} bytes from task {source.pid} to task {target.pid},"
    here, there = (
        check_place(task, address, size, f"{doing} {name} address", name=f"{name}_address")
        for name, task, address in (
            ("source", source, source_address),
            ("target", target, target_address),
        )
    )
    doing = f"copy {size:,} bytes from {here:#x} of task {source.pid} to {there:#x} of task "
    doing += str(target.pid)
    if timeout is None:
        return _copied(source, here, target, there, size, doing)
    if target.is_current:
        raise InvalidArgument(
            f"cannot {doing} with a timeout: what came after it would be written into this "
            "process; give memdesc.copyio.copyin_into a buffer and the timeout",
            errno=errno.EINVAL,
        )
    others = [target] if source.is_current else [target, source]
    return timed(
        timeout,
        others,
        doing,
        lambda until: _copied(source, here, target, there, size, doing, until),
    )


def _copied(
    source: Task,
    here: int,
    target: Task,
    there: int,
    size: int,
    doing: str,
    until: float | None = None,
) -> int:
    upwards = source == target and here < there < here + size
    read, write = _reader(source), _writer(target)
    done = 0
    with memoryview(bytearray(min(size, BOUNCE))) as room:
        for offset, length in _blocks(size, backwards=upwards):
            with room[:length] as block:
                fault = _move(source, here + offset, block, read, doing, until)
                readable = length if fault is None else fault.completed
                if upwards and fault is not None:
                    readable = 0  # what would be written is not next to what was
                with block[:readable] as part:
                    unwritten = _move(target, there + offset, part, write, doing, until)
            if fault := unwritten or fault:
                copied = unwritten.completed if unwritten else readable
                raise _whole(fault, doing, size, done if upwards else done + copied) from fault
            done += length
    return done


def _blocks(size: int, *, backwards: bool) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length); from its end on, where that is asked."""
    starts = range(0, size, BOUNCE)
    for start in reversed(starts) if backwards else starts:
        yield start, min(BOUNCE, size - start)


def _move(
    task: Task,
    address: int,
    block: memoryview,
    moves: tuple[Move, Move | None],
    doing: str,
    until: float | None,
) -> CopyError | None:
    """Move one block; give the fault that stopped it, and raise all else."""
    try:
        transfer(task, address, block, *moves, doing, until)
    except CopyError as fault:
        return bare(fault)
    return None


def _whole(fault: CopyError, doing: str, size: int, completed: int) -> CopyError:
    """Tell a block's fault as one of the whole copy."""
    return CopyError(
        f"cannot {doing}: {completed:,} of {size:,} bytes were copied; {fault.address:#x} of task "
        f"{fault.pid} can not be reached: not mapped there, or protected; look at its maps",
        expected=size,
        completed=completed,
        pid=fault.pid,
        address=fault.address,
        errno=fault.errno,
    )


def _reader(task: Task) -> tuple[Move, Move | None]:
    copier = copier_of(task)
    return (
        lambda at, part: _core.process_vm_readv(task.pid, part, at),
        copier.read if copier else None,
    )


def _writer(task: Task) -> tuple[Move, Move | None]:
    copier = copier_of(task)
    return (
        lambda at, part: _core.process_vm_writev(task.pid, part, at),
        copier.write if copier else None,
    )
