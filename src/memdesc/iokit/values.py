"""The values of the model: its options and codes, and how its ways of failing are spelled."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from memdesc import errors
from memdesc.errors import MemdescError, UnsupportedError, WiringError, WiringReason
from memdesc.mapping import check_range
from memdesc.vm.pages import Direction, page_size
from memdesc.vm.telling import bare

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

Why = list[MemdescError] | None

# IOMemoryDescriptor.h
kIODirectionNone: Final = 0
kIODirectionIn: Final = 1
kIODirectionOut: Final = 2
kIODirectionOutIn: Final = 3
kIODirectionInOut: Final = 3
kIOMemoryThreadSafe: Final = 0x100000

# IOBufferMemoryDescriptor.h
kIOMemoryPhysicallyContiguous: Final = 0x10  # refused: IOMallocContiguous promises it
kIOMemoryPageable: Final = 0x20
kIOMemoryUnshared: Final = 0
kIOMemoryKernelUserShared: Final = 0x10000

# IOMapTypes.h
kIOMapAnywhere: Final = 0x1
kIOMapReadOnly: Final = 0x1000
kIOMapReference: Final = 0x02000000
kIOMapUnique: Final = 0x04000000
kIOMapPrefault: Final = 0x10000000
kIOMapGuardedSmall: Final = 0x40000000
kIOMapGuardedLarge: Final = 0x80000000

# IOReturn.h
kIOReturnSuccess: Final = 0
kIOReturnError: Final = 0xE00002BC
kIOReturnNoMemory: Final = 0xE00002BD
kIOReturnNoResources: Final = 0xE00002BE
kIOReturnNotPrivileged: Final = 0xE00002C1
kIOReturnBadArgument: Final = 0xE00002C2
kIOReturnUnsupported: Final = 0xE00002C7
kIOReturnNotWritable: Final = 0xE00002CF
kIOReturnBusy: Final = 0xE00002D5
kIOReturnTimeout: Final = 0xE00002D6
kIOReturnNotReady: Final = 0xE00002D8
kIOReturnNotAttached: Final = 0xE00002D9
kIOReturnCannotWire: Final = 0xE00002DE
KERN_PROTECTION_FAILURE: Final = 2  # mach/kern_return.h: prepare hands it through

DIRECTIONS = kIODirectionOutIn
DESCRIPTOR_OPTIONS = DIRECTIONS | kIOMemoryThreadSafe
BUFFER_OPTIONS = DESCRIPTOR_OPTIONS | kIOMemoryPageable | kIOMemoryKernelUserShared
GUARDS = {kIOMapGuardedSmall: page_size, kIOMapGuardedLarge: 1 << 16}  # bytes on each side
MAP_OPTIONS = (
    sum(GUARDS) | kIOMapAnywhere | kIOMapReadOnly | kIOMapReference | kIOMapUnique | kIOMapPrefault
)

# xnu: KERN_FAILURE becomes CannotWire and KERN_MEMORY_ERROR NoResources; the rest goes through.
_WIRING_CODES = {
    WiringReason.LIMIT: kIOReturnCannotWire,
    WiringReason.NOT_PRIVILEGED: kIOReturnNotPrivileged,
    WiringReason.NOT_MAPPED: kIOReturnCannotWire,
    WiringReason.PROTECTION: KERN_PROTECTION_FAILURE,
    WiringReason.NOT_WRITABLE: kIOReturnNotWritable,
    WiringReason.NO_MEMORY: kIOReturnNoResources,
    WiringReason.TOO_MANY_MAPPINGS: kIOReturnNoResources,
    WiringReason.OTHER_TASK: kIOReturnCannotWire,
}
_CODES: dict[type[Exception], int] = {
    errors.NotPreparedError: kIOReturnNotReady,
    errors.ClosedError: kIOReturnNotReady,
    errors.AllocationError: kIOReturnNoMemory,
    errors.NotPrivilegedError: kIOReturnNotPrivileged,
    errors.UnsupportedError: kIOReturnUnsupported,
    errors.TimedOutError: kIOReturnTimeout,
    errors.TaskGoneError: kIOReturnNotAttached,
    errors.PeerGoneError: kIOReturnNotAttached,
    errors.RangeError: kIOReturnBadArgument,
    errors.InvalidArgument: kIOReturnBadArgument,
    BufferError: kIOReturnBusy,
}


class NullWhere:
    """Ends its block at an exception of ours, and keeps that in `why`; what follows is None."""

    def __init__(self, why: Why) -> None:
        self._why = why

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if isinstance(error, MemdescError) and self._why is not None:
            self._why.append(bare(error))
        return isinstance(error, MemdescError)


def code_of(act: Callable[[], object]) -> int:
    """Do it and give the IOReturn."""
    try:
        act()
    except WiringError as error:
        return _WIRING_CODES[error.reason]
    except (MemdescError, BufferError) as error:
        return _CODES.get(type(error), kIOReturnError)
    return kIOReturnSuccess


def direction_of(options: int, known: int = DESCRIPTOR_OPTIONS) -> Direction:
    """The direction in options, of which all must be known."""
    if options & ~known:
        raise UnsupportedError(
            f"options {options:#x}: {options & ~known:#x} has no counterpart here (known: "
            f"{known:#x}); docs/iokit.md says what stands in",
            errno=errno.EOPNOTSUPP,
        )
    return Direction(options & DIRECTIONS)


def first_bytes(data: Buffer, length: int) -> memoryview:
    """The first bytes of a buffer of this task; `RangeError` where it has less."""
    view = memoryview(data).cast("B")
    check_range(0, length, view.nbytes, "the buffer given")
    return view[:length]
