"""The rules: how a block crosses, by its size and by what memory it lies in. Pure."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from memdesc.crossing.settings import thresholds as present_thresholds
from memdesc.crossing.sizes import Thresholds
from memdesc.errors import InvalidArgument
from memdesc.vm.pages import Direction, check_integer


class Way(Enum):
    """How a block of bytes gets from one task to another."""

    INLINE = "in the message itself"
    PROCESS_VM = "copied once by the kernel, process_vm_readv or process_vm_writev"
    MAPPING = "mapped, and used in place"
    COPY_ON_WRITE = "a snapshot, mapped: by value and not copied"


@dataclass(frozen=True, slots=True)
class Choice:
    """A way, and in words why it was chosen."""

    way: Way
    reason: str


def way_for(
    nbytes: int,
    *,
    direction: Direction,
    shareable: bool,
    readable: bool,
    keeps: bool = False,
    thresholds: Thresholds | None = None,
) -> Choice:
    """Tell how a block is best handed to another task, the receiver, as an argument of a call.

    Parameters
    ----------
    nbytes : int
        0 or more.
    direction : Direction
        OUT: the receiver only reads it. IN: it fills it. OUT_IN: both.
    shareable : bool
        The block lies in memory that can be granted (a descriptor's); False for private bytes.
    readable : bool
        The kernel lets the receiver copy from and to the giver's memory (asked there:
        `memdesc.copyio.route(giver) is Route.PROCESS_VM`).
    keeps : bool
        The receiver has it beyond the call. What it only reads it then has by value: the giver's
        later stores do not show. What it writes must stay the same memory.
    thresholds : Thresholds, optional
        By default those that hold in this process now.

    Returns
    -------
    Choice
        MAPPING of what is not `shareable` means a buffer made for the crossing, into which (or
        for IN out of which) the giver copies once.

    Raises
    ------
    InvalidArgument
        A negative size; no direction; or private memory that the receiver wants to keep writing.

    Notes
    -----
    I/O Kit: the choice that a driver's `externalMethod` meets as scalar or structure input (up to
    4096 bytes) or as a memory descriptor (larger).

    Examples
    --------
    >>> sizes = Thresholds(inline=4096, mapping=1 << 18, copy_on_write=1 << 20)
    >>> def way(nbytes, **more):
    ...     kind = dict(direction=Direction.OUT, shareable=True, readable=True) | more
    ...     return way_for(nbytes, thresholds=sizes, **kind).way.name
    >>> way(100), way(10_000), way(1 << 20), way(1 << 20, keeps=True)
    ('INLINE', 'PROCESS_VM', 'MAPPING', 'COPY_ON_WRITE')
    """
    size = _check(nbytes, direction)
    limits = _in_force(thresholds)
    if keeps and direction.writes_memory:
        if not shareable:
            raise InvalidArgument(
                f"a receiver can not keep writing {size:,} bytes of private memory, which no other "
                "task can map: allocate them with a BufferMemoryDescriptor",
                errno=errno.EINVAL,
            )
        return Choice(Way.MAPPING, "what the receiver goes on writing must be the same memory")
    if size <= limits.inline:
        return Choice(
            Way.INLINE, f"{size:,} bytes go in the message, which takes up to {limits.inline:,}"
        )
    if not shareable:
        return _private(size, readable)
    return _by_value(size, readable, limits) if keeps else _in_place(size, readable, limits)


def way_to_copy(nbytes: int, *, mappable: bool, thresholds: Thresholds | None = None) -> Choice:
    """Tell how bytes of another task are best copied into a place here: the rule of `copyin`.

    Parameters
    ----------
    nbytes : int
        0 or more.
    mappable : bool
        They lie in memory that this process can map, and that no one can take away under it.
    thresholds : Thresholds, optional
        By default those that hold in this process now.

    Returns
    -------
    Choice
        PROCESS_VM or MAPPING.
    """
    size = _check(nbytes, Direction.OUT)
    limit = _in_force(thresholds).copy_by_mapping
    if not _reaches(size, limit):
        return Choice(Way.PROCESS_VM, f"mapping first does not pay: it does {_from(limit)}")
    if not mappable:
        return Choice(Way.PROCESS_VM, "the memory can not be mapped, or not safely")
    return Choice(Way.MAPPING, f"{size:,} bytes: mapping first pays {_from(limit)}")


def _in_place(size: int, readable: bool, limits: Thresholds) -> Choice:
    """What can be granted, for the time of the call."""
    if _reaches(size, limits.mapping):
        return Choice(
            Way.MAPPING, f"{size:,} bytes: using them in place pays {_from(limits.mapping)}"
        )
    if readable:
        return Choice(
            Way.PROCESS_VM,
            f"{size:,} bytes: one copy beats a mapping, which pays {_from(limits.mapping)}",
        )
    return Choice(Way.MAPPING, "the receiver may not read the giver's memory: it maps it")


def _by_value(size: int, readable: bool, limits: Thresholds) -> Choice:
    """What can be granted, to be kept as it is now."""
    if _reaches(size, limits.copy_on_write):
        return Choice(
            Way.COPY_ON_WRITE, f"{size:,} bytes: a snapshot pays {_from(limits.copy_on_write)}"
        )
    if readable:
        return Choice(
            Way.PROCESS_VM,
            f"{size:,} bytes: one copy beats a snapshot, which pays {_from(limits.copy_on_write)}",
        )
    return Choice(
        Way.COPY_ON_WRITE, "the receiver may not read the giver's memory: it maps a snapshot"
    )


def _private(size: int, readable: bool) -> Choice:
    if readable:
        return Choice(Way.PROCESS_VM, "private memory can not be mapped: the kernel copies it once")
    return Choice(
        Way.MAPPING,
        f"private memory that the receiver may not read: {size:,} bytes go through a buffer made "
        "for it, which the receiver maps",
    )


def _reaches(size: int, limit: int | None) -> bool:
    return limit is not None and size >= limit


def _from(limit: int | None) -> str:
    return "at no size" if limit is None else f"from {limit:,} bytes on"


def _check(nbytes: int, direction: Direction) -> int:
    size = check_integer(nbytes, "nbytes")
    if size < 0:
        raise InvalidArgument(f"nbytes is {size}: give 0 or more bytes", errno=errno.EINVAL)
    if Direction(direction) is Direction.NONE:
        raise InvalidArgument(
            "a block that crosses needs a direction: give IN, OUT or OUT_IN", errno=errno.EINVAL
        )
    return size


def _in_force(given: Thresholds | None) -> Thresholds:
    return present_thresholds() if given is None else given
