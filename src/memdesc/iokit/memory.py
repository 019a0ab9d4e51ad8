"""The model's descriptors and maps."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import CopyError, InvalidArgument, MemdescError, UnsupportedError
from memdesc.iokit.values import (
    BUFFER_OPTIONS,
    GUARDS,
    MAP_OPTIONS,
    NullWhere,
    Why,
    code_of,
    direction_of,
    first_bytes,
    kIODirectionNone,
    kIOMapAnywhere,
    kIOMapPrefault,
    kIOMapReadOnly,
    kIOMapReference,
    kIOMapUnique,
    kIOMemoryKernelUserShared,
    kIOMemoryPageable,
    kIOMemoryPhysicallyContiguous,
    kIOReturnSuccess,
)
from memdesc.mapping import MemoryMap
from memdesc.vm.pages import Access, page_size
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on


class IOMemoryDescriptor:
    """Describes memory; `descriptor` is what it spells: a `memdesc.MemoryDescriptor`."""

    def __init__(self, descriptor: MemoryDescriptor) -> None:
        self.descriptor = descriptor

    @staticmethod
    def withAddress(
        address: Buffer, withLength: int, withDirection: int, why: Why = None
    ) -> IOMemoryDescriptor | None:
        """Describe memory of the own task; nothing is wired unless `prepare` is called."""
        with NullWhere(why):
            part, direction = first_bytes(address, withLength), direction_of(withDirection)
            return IOMemoryDescriptor(MemoryDescriptor.with_buffer(part, direction))
        return None

    @staticmethod
    def withAddressRange(
        address: int, length: int, options: int, task: Task | None, why: Why = None
    ) -> IOMemoryDescriptor | None:
        """Describe memory of a task. No task is physical memory in the model: refused."""
        with NullWhere(why):
            if task is None:
                raise UnsupportedError(
                    f"{length:,} bytes at {address:#x} of no task: physical memory can not be "
                    "described here; give a task",
                    errno=errno.EOPNOTSUPP,
                )
            direction = direction_of(options)
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
        with NullWhere(why):
            direction_of(options, MAP_OPTIONS)
            if intoTask is None:
                raise InvalidArgument("no task to map into: give one", errno=errno.EINVAL)
            guard = max((size for bit, size in GUARDS.items() if options & bit), default=0)
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
        return code_of(
            lambda: self.descriptor.prepare(direction_of(forDirection) if forDirection else None)
        )

    def complete(self, forDirection: int = kIODirectionNone) -> int:
        """Undo one prepare; the direction does not matter, as in the model.

        kIOReturnNotReady where there is none to undo (the model says success).
        """
        return code_of(self.descriptor.complete)

    def readBytes(self, offset: int, bytes: Buffer, withLength: int) -> int:
        """Copy out of it; the count, which is 0 where the range leaves it."""
        target = first_bytes(bytes, withLength)
        with NullWhere(None):
            target[:] = self.descriptor.read_bytes(offset, withLength)
            return withLength
        return 0

    def writeBytes(self, offset: int, bytes: Buffer | None, withLength: int) -> int:
        """Copy into it (NULL: zeros); the count, which is 0 where the range leaves it."""
        source = bytearray(withLength) if bytes is None else first_bytes(bytes, withLength)
        try:
            self.descriptor.write_bytes(offset, source)
        except MemdescError as error:
            return error.completed if isinstance(error, CopyError) else 0
        return withLength

    def release(self) -> None:
        """Let go of it; mappings that exist go on."""
        self.descriptor.close()


class IOBufferMemoryDescriptor(IOMemoryDescriptor):
    """Allocates memory that can be shared: `memdesc.BufferMemoryDescriptor`.

    Examples
    --------
    >>> from memdesc.iokit import *
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
        with NullWhere(why):
            direction = direction_of(options, BUFFER_OPTIONS)
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
        source = first_bytes(bytes, withLength)
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
        source = first_bytes(bytes, withLength)
        return code_of(lambda: self.descriptor.append_bytes(source)) == kIOReturnSuccess

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
        with NullWhere(why):
            part = SubMemoryDescriptor(of.descriptor, offset, length, direction_of(options))
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
        with NullWhere(why):
            members = [member.descriptor for member in descriptors[:withCount]]
            whole = MultiMemoryDescriptor(members, direction_of(withDirection))
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
        return code_of(self.mapping.unmap)

    def release(self) -> None:
        """End it as soon as no view needs it."""
        self.mapping.__exit__()
