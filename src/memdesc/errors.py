"""Every exception of the library, and the reasons that mapping and wiring fail for.

One root, `MemdescError`. Each class is also the builtin that a caller would already catch,
and keeps `errno`. A message says what was tried, with the numbers, the cause, and what to do.
Exceptions survive pickling with all their fields. This module knows no other room.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = [
    "MemdescError",
    "InvalidArgument",
    "RangeError",
    "ClosedError",
    "TaskGoneError",
    "NotPrivilegedError",
    "UnsupportedError",
    "AllocationError",
    "PageKindError",
    "ZoneExhausted",
    "DoubleFreeError",
    "UseAfterFreeError",
    "SealedError",
    "MappingError",
    "MappingReason",
    "WiringError",
    "WiringReason",
    "NotPreparedError",
    "CopyError",
    "StringTooLongError",
    "TransferError",
    "DeviceError",
    "SegmentError",
    "SegmentReason",
    "ServiceNotFoundError",
    "NameInUseError",
    "BlockExistsError",
    "BlockNotFoundError",
    "ShareNotFoundError",
    "MethodNotFoundError",
    "RemoteError",
    "LimitError",
    "AccessDeniedError",
    "PeerGoneError",
    "ProtocolError",
    "TimedOutError",
]


class MemdescError(Exception):
    """Root of the family.

    Parameters
    ----------
    message : str
        What was tried, the numbers, the cause, what to do.
    errno : int, optional
        The kernel's (or the nearest) error number; None where none applies.
    """

    errno: int | None
    _FIELDS: tuple[str, ...] = ()

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        # OSError.__init__ fills errno and strerror from two arguments; the others take one.
        if isinstance(self, OSError):
            super().__init__(errno, message)
        else:
            super().__init__(message)
        self.message = message
        self.errno = errno

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        fields = {name: getattr(self, name) for name in self._FIELDS}
        return _rebuild, (type(self), self.message, self.errno, fields)


def _rebuild(
    kind: type[MemdescError], message: str, errno: int | None, fields: dict[str, Any]
) -> MemdescError:
    return kind(message, errno=errno, **fields)


def describe_errno(error: OSError) -> str:
    """Give the kernel's answer as it stands in our messages: the call and the errno's name."""
    import errno as names

    call, colon, _ = (error.strerror or "").partition(": ")
    if not colon:
        call = "the kernel"
    name = names.errorcode.get(error.errno or 0, str(error.errno))
    return f"{call} answered {name}"


class InvalidArgument(MemdescError, ValueError):
    """An argument is outside what the call is defined for."""


class RangeError(MemdescError, IndexError):
    """An offset or length reaches past the memory that is described. Nothing is ever clipped."""


class ClosedError(MemdescError, ValueError):
    """The object was closed, or belongs to the parent of this forked process."""


class TaskGoneError(MemdescError, ProcessLookupError):
    """The task has ended, or its pid now names another process (ESRCH)."""


class NotPrivilegedError(MemdescError, PermissionError):
    """The kernel denies this process the means (EPERM, EACCES); the message names the privilege."""


class UnsupportedError(MemdescError, NotImplementedError):
    """This kernel lacks the feature; the message says since when Linux has it."""


class AllocationError(MemdescError, OSError, MemoryError):
    """The memory can not be reserved (ENOMEM, ENOSPC, EMFILE, …): raised at creation.

    Attributes
    ----------
    requested, available : int or None
        Bytes asked for, and bytes that the tightest limit leaves.
    """

    _FIELDS: tuple[str, ...] = ("requested", "available")

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        requested: int | None = None,
        available: int | None = None,
    ) -> None:
        super().__init__(message, errno=errno)
        self.requested, self.available = requested, available


class PageKindError(AllocationError):
    """Huge pages were asked for by name and are not to be had (ENOMEM; EINVAL: never here).

    Base pages might be: `pages=AUTO` falls back to them.
    """


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds what of a zone, or of the zone map: one row of a table.

    Attributes
    ----------
    holder : str
        Where the elements were allocated (file:line and function), if the zone tracks that. Of the
        zone map: the zone's name.
    elements, nbytes : int
        How many, and how many bytes they are.
    oldest, newest : int
        Which allocations of the zone they are, counted from 1; 0 where there is none.
    """

    holder: str
    elements: int
    nbytes: int
    oldest: int
    newest: int


class ZoneExhausted(AllocationError):
    """A zone has no element left (ENOMEM), or none came free in the time given (ETIMEDOUT).

    Attributes
    ----------
    zone : str
        Its name.
    holders : tuple of Holding
        Who holds the elements; where the zone map or the machine is full, the zones that hold
        memory.
    """

    _FIELDS = ("requested", "available", "zone", "holders")

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        requested: int | None = None,
        available: int | None = None,
        zone: str = "",
        holders: tuple[Holding, ...] = (),
    ) -> None:
        super().__init__(message, errno=errno, requested=requested, available=available)
        self.zone, self.holders = zone, holders


class DoubleFreeError(MemdescError, ValueError):
    """What is to be freed was freed before."""


class UseAfterFreeError(MemdescError, RuntimeError):
    """Memory was written to after it was freed: found when it was to be given out again.

    Attributes
    ----------
    address, offset, value : int
        Of the element; of the first changed byte in it; and what that byte is now.
    """

    _FIELDS = ("address", "offset", "value")

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        address: int = 0,
        offset: int = 0,
        value: int = 0,
    ) -> None:
        super().__init__(message, errno=errno)
        self.address, self.offset, self.value = address, offset, value


class SealedError(MemdescError, PermissionError):
    """The memory's seals, or its `max_access`, forbid what was asked."""


class MappingReason(Enum):
    """Why a mapping could not be made. `docs/why-your-map-failed.md` has a section for each."""

    ZERO_LENGTH = "the descriptor, or the range asked for, is empty"
    OUT_OF_RANGE = "the range asked for reaches past the descriptor"
    ACCESS = "more access was asked for than the memory gives to that task"
    NOT_ENFORCED = "read-only was asked for on memory whose seals can not enforce it"
    TASK_GONE = "the task has ended"
    NOT_MAPPED = "the described addresses are not (all) mapped in their task"
    PRIVATE_MEMORY = "private memory (malloc, the stack, …) can not be mapped by another task"
    ZONE_MEMORY = "zone memory is small, private and never shared"
    SEVERAL_OBJECTS = "the described addresses belong to more than one VM object"
    CAN_SHRINK = "the owner of the object could take its pages away under the mapping"
    NOT_CONGRUENT = "inner borders of the ranges do not lie on page borders"
    ADDRESS_UNALIGNED = "the fixed address is not a multiple of the page size"
    ADDRESS_IN_USE = "something is mapped at the fixed address"
    GUARDS_NEED_ANYWHERE = "guard pages can not be had at a fixed address"
    NO_SUCH_MAPPING = "no mapping exists that this one could refer to"
    NO_SPACE = "the task has no room for it in its address space"
    TOO_MANY_MAPPINGS = "the task has reached vm.max_map_count"
    TOO_MANY_FILES = "the task has no file descriptor left"
    NO_MEMORY = "the memory for it could not be had"
    NOT_PRIVILEGED = "the kernel does not let this process reach that memory"
    NOT_CONNECTED = "no connection to that task exists"
    SEVERAL_CONNECTIONS = "more than one connection to that task exists"
    NOT_ANSWERING = "the task did not answer in time"
    REFUSED = "the task refused the mapping"
    PEER_GONE = "the connection to the task ended"
    FALSE_ANSWER = "the task's maps do not show what it answered"


class MappingError(MemdescError, OSError):
    """`create_mapping_in_task`, `map` or the unmapping of one failed; `reason` says why.

    I/O Kit returns NULL for all of these (`IOMemoryDescriptor::createMappingInTask`).

    Attributes
    ----------
    reason : MappingReason
    """

    _FIELDS = ("reason",)

    def __init__(self, message: str, *, reason: MappingReason, errno: int | None = None) -> None:
        super().__init__(message, errno=errno)
        self.reason = reason


class WiringReason(Enum):
    """Why memory could not be wired."""

    LIMIT = "the task's limit on locked memory (RLIMIT_MEMLOCK)"
    NOT_PRIVILEGED = "the task may not lock memory at all"
    NOT_MAPPED = "part of the range is not mapped"
    PROTECTION = "part of the range may not be accessed"
    NOT_WRITABLE = "memory wired for reading only can not be wired for writing meanwhile"
    NO_MEMORY = "the pages could not be brought into memory"
    TOO_MANY_MAPPINGS = "the task has reached vm.max_map_count"
    OTHER_TASK = "private memory of another task can not be wired from here"


class WiringError(MemdescError, OSError):
    """`wire`, `prepare` or `wired=True` failed; nothing that the call touched stays wired.

    Attributes
    ----------
    reason : WiringReason
    """

    _FIELDS = ("reason",)

    def __init__(self, message: str, *, reason: WiringReason, errno: int | None = None) -> None:
        super().__init__(message, errno=errno)
        self.reason = reason


class NotPreparedError(MemdescError, RuntimeError):
    """`complete()` without a `prepare()` before it, or prepared memory was needed."""


class CopyError(MemdescError, OSError):
    """copyin, copyout, copyinstr or copy_between met an address that can not be reached.

    Attributes
    ----------
    expected, completed : int
        Bytes asked for, and bytes copied before the fault (they stay copied).
    pid, address : int or None
        The task whose memory could not be reached, and the first address that could not.
    """

    _FIELDS: tuple[str, ...] = ("expected", "completed", "pid", "address")

    def __init__(
        self,
        message: str,
        *,
        expected: int = 0,
        completed: int = 0,
        pid: int | None = None,
        address: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message, errno=errno)
        self.expected, self.completed, self.pid, self.address = expected, completed, pid, address


class StringTooLongError(CopyError):
    """copyinstr found no NUL within the maximum (ENAMETOOLONG); `data` holds what was read."""

    _FIELDS = (*CopyError._FIELDS, "data")

    def __init__(
        self,
        message: str,
        *,
        expected: int = 0,
        completed: int = 0,
        pid: int | None = None,
        address: int | None = None,
        errno: int | None = None,
        data: bytes = b"",
    ) -> None:
        super().__init__(
            message, expected=expected, completed=completed, pid=pid, address=address, errno=errno
        )
        self.data = data


class SegmentReason(Enum):
    """Why memory can not be laid out for a device."""

    ADDRESS_BITS = "it lies above the addresses that the device can reach"
    ALIGNMENT = "it does not begin where the device's alignment asks for"
    LENGTH_ALIGNMENT = "its length is no multiple of what the device asks for"
    MOVED = "its pages are no longer those that were pinned"


class SegmentError(MemdescError, ValueError):
    """A physical segment of a `DMACommand` does not meet its specification.

    Attributes
    ----------
    reason : SegmentReason
    offset, address : int
        Of the segment: in the transfer, and in physical memory.
    """

    _FIELDS = ("reason", "offset", "address")

    def __init__(
        self,
        message: str,
        *,
        reason: SegmentReason,
        errno: int | None = None,
        offset: int = 0,
        address: int = 0,
    ) -> None:
        super().__init__(message, errno=errno)
        self.reason, self.offset, self.address = reason, offset, address


class TransferError(MemdescError, OSError):
    """A device failed in a transfer, or refused a part of it (EIO, ENOSPC, EFBIG, …).

    Attributes
    ----------
    expected, completed : int
        Bytes asked for, and bytes before the first that was not transferred. Others may have been.
    file_offset : int or None
        Where the first request to fail began.
    """

    _FIELDS = ("expected", "completed", "file_offset")

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        expected: int = 0,
        completed: int = 0,
        file_offset: int | None = None,
    ) -> None:
        super().__init__(message, errno=errno)
        self.expected, self.completed, self.file_offset = expected, completed, file_offset


class DeviceError(MemdescError, OSError):
    """A GPU or its driver failed a call; `code` and `name` are CUDA's own of the error.

    errno is the nearest: ENOMEM, EBUSY (registered already), ENOENT, EINVAL, ENODEV, else EIO.
    """

    _FIELDS = ("code", "name")

    def __init__(
        self, message: str, *, errno: int | None = None, code: int = 0, name: str = ""
    ) -> None:
        super().__init__(message, errno=errno)
        self.code, self.name = code, name


class ServiceNotFoundError(MemdescError, ConnectionError):
    """No service of that name appeared in time (ENOENT, ECONNREFUSED)."""


class NameInUseError(MemdescError, OSError):
    """A living service has that name (EADDRINUSE)."""


class BlockExistsError(MemdescError, FileExistsError):
    """A block of shared memory of that name exists (EEXIST)."""


class BlockNotFoundError(MemdescError, FileNotFoundError):
    """There is no block of shared memory of that name, or not any more (ENOENT)."""


class ShareNotFoundError(MemdescError, KeyError):
    """The service shares nothing under that name, or not with this client."""


class MethodNotFoundError(MemdescError, KeyError):
    """The service has no method of that name (ENOENT)."""


class RemoteError(MemdescError, RuntimeError):
    """A method of the service failed by an error of its own, which stays there.

    Attributes
    ----------
    reference : str
        What the service's log has it under, with its stack.
    """

    _FIELDS = ("reference",)

    def __init__(self, message: str, *, errno: int | None = None, reference: str = "") -> None:
        super().__init__(message, errno=errno)
        self.reference = reference


class LimitError(MemdescError, OSError):
    """The other side of the connection lets this one take no more of something (EDQUOT)."""


class AccessDeniedError(MemdescError, PermissionError):
    """The other side does not admit this task: its rule (EACCES) or a limit (EDQUOT, EMFILE)."""


class PeerGoneError(MemdescError, ConnectionError):
    """The other side of the connection has ended (ECONNRESET)."""


class ProtocolError(MemdescError, ConnectionError):
    """The other side sent what is not of the protocol; the connection was ended (EPROTO)."""


class TimedOutError(MemdescError, TimeoutError):
    """The time given ran out (ETIMEDOUT)."""
