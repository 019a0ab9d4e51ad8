"""The model's own spelling: I/O Kit's names over ours, so that its code runs nearly to the letter.

It adds no behaviour; every name is one call of the rooms below, and `docs/iokit.md` has the table.
How C's ways are spelled in Python:

* NULL is None. Why, is in an out-argument: every call that may give NULL takes ``why``, a list
  that gets the exception which memdesc raised (``why = []``, then ``why[0].reason``). Nothing is
  kept in a variable of this module: there is no "last error" that another thread could change.
* An IOReturn or errno is the code itself; a count is a count; a C out-argument is a list.
* What the model gives no way to fail (`setLength`) raises.
* A pointer to memory of this task is a buffer; an address in another task is an integer.
* An option that has no counterpart is refused (`UnsupportedError`), never passed over.
* `release` ends what it is called on; Python counts the references, so there is no `retain`.

The service's process plays the kernel: `kernel_task` is the own task, as `current_task()` is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from memdesc import copyio, errors
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import MemdescError, UnsupportedError, WiringError, WiringReason
from memdesc.mapping import MemoryMap, check_range
from memdesc.vm.pages import (
    Access,
    Direction,
    page_size as page_size,
    round_page as round_page,
    trunc_page as trunc_page,
)
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    kernel_task: Task

Why = list[MemdescError] | None

# IOMemoryDescriptor.h
kIODirectionNone: Final = 0
kIODirectionIn: Final = 1
kIODirectionOut: Final = 2
kIODirectionOutIn: Final = 3
kIODirectionInOut: Final = 3
kIOMemoryThreadSafe: Final = 0x100000

# IOBufferMemoryDescriptor.h
kIOMemoryPhysicallyContiguous: Final = 0x10  # refused: not to be promised by this call
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

_DIRECTIONS = kIODirectionOutIn
_DESCRIPTOR_OPTIONS = _DIRECTIONS | kIOMemoryThreadSafe
_BUFFER_OPTIONS = _DESCRIPTOR_OPTIONS | kIOMemoryPageable | kIOMemoryKernelUserShared
_GUARDS = {kIOMapGuardedSmall: page_size, kIOMapGuardedLarge: 1 << 16}  # bytes on each side
_MAP_OPTIONS = (
    sum(_GUARDS) | kIOMapAnywhere | kIOMapReadOnly | kIOMapReference | kIOMapUnique | kIOMapPrefault
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


def __getattr__(name: str) -> Task:
    if name == "kernel_task":  # at each use, so that in a fork child it is the child
        return Task.current()
    raise AttributeError(f"module 'memdesc.iokit' has no attribute {name!r}")


def current_task() -> Task:
    """Give the own task."""
    return Task.current()


class _NullWhere:
    """Ends its block at an exception of ours, and keeps that in `why`; what follows is None."""

    def __init__(self, why: Why) -> None:
        self._why = why

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if isinstance(error, MemdescError) and self._why is not None:
            self._why.append(error)
        return isinstance(error, MemdescError)


def _code_of(act: Callable[[], object]) -> int:
    """Do it and give the IOReturn."""
    try:
        act()
    except WiringError as error:
        return _WIRING_CODES[error.reason]
    except (MemdescError, BufferError) as error:
        return _CODES.get(type(error), kIOReturnError)
    return kIOReturnSuccess


def _direction(options: int, known: int = _DESCRIPTOR_OPTIONS) -> Direction:
    """The direction in options, of which all must be known."""
    if options & ~known:
        raise UnsupportedError(
            f"options {options:#x}: {options & ~known:#x} has no counterpart here (known: "
            f"{known:#x}); docs/iokit.md says what stands in",
            errno=errno.EOPNOTSUPP,
        )
    return Direction(options & _DIRECTIONS)


def _first(data: Buffer, length: int) -> memoryview:
    """The first bytes of a buffer of this task; `RangeError` where it has less."""
    view = memoryview(data).cast("B")
    check_range(0, length, view.nbytes, "the buffer given")
    return view[:length]


class IOMemoryDescriptor:
    """Describes memory; `descriptor` is what it spells: a `memdesc.MemoryDescriptor`."""

    def __init__(self, descriptor: MemoryDescriptor) -> None:
        self.descriptor = descriptor

    @staticmethod
    def withAddress(
        address: Buffer, withLength: int, withDirection: int, why: Why = None
    ) -> IOMemoryDescriptor | None:
        """Describe memory of the own task; nothing is wired unless `prepare` is called."""
        with _NullWhere(why):
            part, direction = _first(address, withLength), _direction(withDirection)
            return IOMemoryDescriptor(MemoryDescriptor.with_buffer(part, direction))
        return None

    @staticmethod
    def withAddressRange(
        address: int, length: int, options: int, task: Task | None, why: Why = None
    ) -> IOMemoryDescriptor | None:
        """Describe memory of a task. No task is physical memory in the model: refused."""
        with _NullWhere(why):
            if task is None:
                raise UnsupportedError(
                    f"{length:,} bytes at {address:#x} of no task: physical memory can not be "
                    "described here; give a task",
                    errno=errno.EOPNOTSUPP,
                )
            direction = _direction(options)
            range_ = MemoryDescriptor.with_address_range(address, length, direction, task)
            return IOMemoryDescriptor(range_)
        return None

    def getLength(self) -> int:
        """Bytes described."""
        return self.descriptor.length

    def getDirection(self) -> int:
        """As one of the kIODirection constants."""
        return self.descriptor.direction.value

    def createMappingInTask(
        self,
        intoTask: Task | None,
        atAddress: int,
        options: int,
        offset: int = 0,
        length: int = 0,
        why: Why = None,
    ) -> IOMemoryMap | None:
        """Make it visible in a task, with the most access that it gives, or kIOMapReadOnly.

        A length of 0 is that of the descriptor, as in the model also with an offset.
        """
        with _NullWhere(why):
            _direction(options, _MAP_OPTIONS)
            if intoTask is None:
                raise errors.InvalidArgument("no task to map into: give one", errno=errno.EINVAL)
            guard = max((size for bit, size in _GUARDS.items() if options & bit), default=0)
            mapping = self.descriptor.create_mapping_in_task(
                intoTask,
                offset=offset,
                length=length or self.descriptor.length,
                access=Access.READ_ONLY if options & kIOMapReadOnly else None,
                prefault=bool(options & kIOMapPrefault),
                guard_pages=guard // page_size,
                unique=bool(options & kIOMapUnique),
                reference=bool(options & kIOMapReference),
                at_address=None if options & kIOMapAnywhere else atAddress,
            )
            return IOMemoryMap(mapping, self)
        return None

    def map(self, options: int = 0, why: Why = None) -> IOMemoryMap | None:
        """Make it visible in the own task. Deprecated in the model for createMappingInTask."""
        return self.createMappingInTask(Task.current(), 0, options | kIOMapAnywhere, why=why)

    def prepare(self, forDirection: int = kIODirectionNone) -> int:
        """Wire it, counted; None as the direction is the descriptor's own."""
        return _code_of(
            lambda: self.descriptor.prepare(_direction(forDirection) if forDirection else None)
        )

    def complete(self, forDirection: int = kIODirectionNone) -> int:
        """Undo one prepare; the direction does not matter, as in the model.

        kIOReturnNotReady where there is none to undo (the model says success).
        """
        return _code_of(self.descriptor.complete)

    def readBytes(self, offset: int, bytes: Buffer, withLength: int) -> int:
        """Copy out of it; the count, which is 0 where the range leaves it."""
        target = _first(bytes, withLength)
        with _NullWhere(None):
            target[:] = self.descriptor.read_bytes(offset, withLength)
            return withLength
        return 0

    def writeBytes(self, offset: int, bytes: Buffer | None, withLength: int) -> int:
        """Copy into it (NULL: zeros); the count, which is 0 where the range leaves it."""
        source = bytearray(withLength) if bytes is None else _first(bytes, withLength)
        try:
            self.descriptor.write_bytes(offset, source)
        except MemdescError as error:
            return error.completed if isinstance(error, errors.CopyError) else 0
        return withLength

    def release(self) -> None:
        """Let go of it; mappings that exist go on."""
        self.descriptor.close()


class IOBufferMemoryDescriptor(IOMemoryDescriptor):
    """Allocates memory that can be shared: `memdesc.BufferMemoryDescriptor`.

    Examples
    --------
    >>> memDesc = IOBufferMemoryDescriptor.withOptions(
    ...               kIODirectionOutIn | kIOMemoryKernelUserShared, 54321, page_size )
    >>> memDesc.createMappingInTask(current_task(), 0, kIOMapAnywhere).getLength()
    54321
    """

    descriptor: BufferMemoryDescriptor

    @staticmethod
    def withOptions(
        options: int, capacity: int, alignment: int = 1, why: Why = None
    ) -> IOBufferMemoryDescriptor | None:
        """Allocate; kIOMemoryKernelUserShared is what lets others write (READ_WRITE)."""
        return IOBufferMemoryDescriptor.inTaskWithOptions(None, options, capacity, alignment, why)

    @staticmethod
    def inTaskWithOptions(
        inTask: Task | None, options: int, capacity: int, alignment: int = 1, why: Why = None
    ) -> IOBufferMemoryDescriptor | None:
        """Allocate. For another task than the own: refused; map a buffer into it instead."""
        with _NullWhere(why):
            direction = _direction(options, _BUFFER_OPTIONS)
            if inTask is not None and not inTask.is_current:
                told = f"task {inTask.pid} can not own it: allocate here, then createMappingInTask"
                raise UnsupportedError(told, errno=errno.EOPNOTSUPP)
            shared = options & kIOMemoryKernelUserShared
            buffer = BufferMemoryDescriptor(
                capacity,
                direction=direction,
                max_access=Access.READ_WRITE if shared else Access.READ_ONLY,
                alignment=alignment,
                lazy=bool(options & kIOMemoryPageable),
            )
            return IOBufferMemoryDescriptor(buffer)
        return None

    @staticmethod
    def withCapacity(
        capacity: int, withDirection: int, withContiguousMemory: bool = False, why: Why = None
    ) -> IOBufferMemoryDescriptor | None:
        """Allocate, unshared: others get READ_ONLY at most. Contiguous memory: refused."""
        options = withDirection | (kIOMemoryPhysicallyContiguous if withContiguousMemory else 0)
        return IOBufferMemoryDescriptor.withOptions(options, capacity, 1, why)

    @staticmethod
    def withBytes(
        bytes: Buffer,
        withLength: int,
        withDirection: int,
        withContiguousMemory: bool = False,
        why: Why = None,
    ) -> IOBufferMemoryDescriptor | None:
        """Allocate, and copy the first bytes of a buffer in."""
        source = _first(bytes, withLength)
        made = IOBufferMemoryDescriptor.withCapacity(
            withLength, withDirection, withContiguousMemory, why
        )
        if made is not None:
            made.descriptor.write_bytes(0, source)
        return made

    def getCapacity(self) -> int:
        """Bytes asked for, not rounded."""
        return self.descriptor.capacity

    def setLength(self, length: int) -> None:
        """Describe only the first bytes; `RangeError` past the capacity (the model ignores it)."""
        self.descriptor.set_length(length)

    def appendBytes(self, bytes: Buffer, withLength: int) -> bool:
        """Add bytes; False and nothing added where they do not fit (the model truncates)."""
        source = _first(bytes, withLength)
        return _code_of(lambda: self.descriptor.append_bytes(source)) == kIOReturnSuccess

    def getBytesNoCopy(self, start: int = 0, withLength: int | None = None) -> memoryview | None:
        """View the pages themselves; of a part, None where that leaves the length."""
        whole = memoryview(self.descriptor)
        if withLength is None:
            return whole
        if not 0 <= start < len(whole) or not 0 <= withLength <= len(whole) - start:
            return None
        return whole[start : start + withLength]


class IOSubMemoryDescriptor(IOMemoryDescriptor):
    """Describes a part of another: `memdesc.SubMemoryDescriptor`."""

    @staticmethod
    def withSubRange(
        of: IOMemoryDescriptor, offset: int, length: int, options: int, why: Why = None
    ) -> IOSubMemoryDescriptor | None:
        """Describe `length` bytes at `offset` of another descriptor."""
        with _NullWhere(why):
            part = SubMemoryDescriptor(of.descriptor, offset, length, _direction(options))
            return IOSubMemoryDescriptor(part)
        return None


class IOMultiMemoryDescriptor(IOMemoryDescriptor):
    """Describes several as one: `memdesc.MultiMemoryDescriptor`."""

    @staticmethod
    def withDescriptors(
        descriptors: Sequence[IOMemoryDescriptor],
        withCount: int,
        withDirection: int,
        asReference: bool = False,
        why: Why = None,
    ) -> IOMultiMemoryDescriptor | None:
        """Describe the first `withCount` descriptors as one. The list is copied anyway."""
        with _NullWhere(why):
            members = [member.descriptor for member in descriptors[:withCount]]
            whole = MultiMemoryDescriptor(members, _direction(withDirection))
            return IOMultiMemoryDescriptor(whole)
        return None


class IOMemoryMap:
    """Memory visible in a task; `mapping` is what it spells: a `memdesc.MemoryMap`."""

    def __init__(self, mapping: MemoryMap, descriptor: IOMemoryDescriptor) -> None:
        self.mapping = mapping
        self._descriptor = descriptor

    def getAddress(self) -> int:
        """Of the first byte, in its task; 0 once unmapped."""
        return self.mapping.address if self.mapping.is_mapped else 0

    getVirtualAddress = getAddress

    def getLength(self) -> int:
        """Bytes, as asked for."""
        return self.mapping.length

    def getAddressTask(self) -> Task | None:
        """Whose address it is; None once unmapped."""
        return self.mapping.task if self.mapping.is_mapped else None

    def getMemoryDescriptor(self) -> IOMemoryDescriptor:
        """What it makes visible."""
        return self._descriptor

    def unmap(self) -> int:
        """End it now. kIOReturnBusy while views of it are alive (the model pulls it away)."""
        return _code_of(self.mapping.unmap)

    def release(self) -> None:
        """End it as soon as no view needs it."""
        self.mapping.__exit__()


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
    into = _first(kaddr, nbytes)
    return _errno_of(lambda: copyio.copyin_into(task, uaddr, into))


def copyout(kaddr: Buffer, uaddr: int, nbytes: int, task: Task) -> int:
    """Copy from a buffer here to a task's address; give the errno, 0 for none."""
    data = _first(kaddr, nbytes)
    return _errno_of(lambda: copyio.copyout(data, task, uaddr))


def copyinstr(uaddr: int, kaddr: Buffer, nbytes: int, done: list[int] | None, task: Task) -> int:
    """Copy a string in with its NUL; give the errno, 0 for none.

    `done` gets the bytes copied: with the NUL, or all of `nbytes` at ENAMETOOLONG, else 0.
    """
    into, found, result = _first(kaddr, nbytes), b"", 0
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
