"""Memory that lies in a task already: a range of addresses there, or a Python buffer here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, final

from memdesc import _core
from memdesc.copyio import bytes_of, copyin, copyin_into, copyout
from memdesc.descriptors.base import MemoryDescriptor, PageCounts
from memdesc.errors import (
    InvalidArgument,
    MappingError,
    MappingReason,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
    TimedOutError,
    WiringError,
    WiringReason,
)
from memdesc.mapping import Extent, Placement, check_range, explained, map_extents
from memdesc.memory import zone_map
from memdesc.memory.foreign import ForeignObject
from memdesc.memory.memfd import MemoryObject, anonymous_device, find_owned, memory_devices
from memdesc.vm.objects import open_object
from memdesc.vm.pages import (
    MAX_LENGTH,
    Access,
    Direction,
    check_integer,
    check_length,
    page_size,
    page_span,
)
from memdesc.vm.regions import ObjectKind, Region, find_holes, regions_in
from memdesc.vm.task import Task, check_task
from memdesc.wiring import wire

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    from memdesc.descriptors.freezing import Reader

_REASONS = (NotPrivilegedError, TaskGoneError, TimedOutError)


def _not_seen(error: MemdescError) -> MappingError:
    """Say that a task's regions, or what lies behind one, could not be looked at."""
    if isinstance(error, TaskGoneError):
        reason = MappingReason.TASK_GONE
    elif isinstance(error, TimedOutError):
        reason = MappingReason.NOT_ANSWERING
    else:
        reason = MappingReason.NOT_PRIVILEGED
    return MappingError(str(error), reason=reason, errno=error.errno)


@final
class AddressRangeDescriptor(MemoryDescriptor):
    """Describes a range of addresses in a task that need not know of us.

    I/O Kit: IOMemoryDescriptor::withAddressRange. As there, nothing is looked at until the memory
    is mapped, wired or copied.

    Parameters
    ----------
    address, length : int
        Bytes, in the address space of `task`.
    direction : Direction
    task : Task, optional
        This task by default. Kept open by the caller as long as the descriptor is used.
    allow_several_objects : bool
        Map a range over several VM objects as one contiguous view. The seed's rule, one object,
        is the default.
    trust_size : bool
        Map objects that their owner may truncate (files, unsealed memfds): an access to a page
        that he took away kills this process with SIGBUS.

    Notes
    -----
    `read_bytes` and `write_bytes` go by copyin and copyout, and so work on private memory too.
    Mapping works on shared memory only, and needs a privilege: see `memdesc.vm.objects`.
    """

    def __init__(
        self,
        address: int,
        length: int,
        direction: Direction,
        task: Task | None = None,
        *,
        allow_several_objects: bool = False,
        trust_size: bool = False,
    ) -> None:
        if task is not None:
            check_task(task)
        self.task = Task.current() if task is None else task
        self.address = check_integer(address, "address")
        self._length = check_length(length)
        if self.address < 0 or self.address > MAX_LENGTH - page_size - self._length:
            raise InvalidArgument(
                f"{self._length:,} bytes at {self.address:#x} reach past the end of any address "
                "space",
                errno=errno.EINVAL,
            )
        super().__init__(direction, f"{self.task.pid}:{self.address:#x}")
        self.allow_several_objects = allow_several_objects
        self.trust_size = trust_size
        self._window: _core.Window | memoryview | None = None

    @property
    def length(self) -> int:
        """Bytes described."""
        return self._length

    @property
    def max_access(self) -> Access:
        """What the regions allow their own task now; READ_ONLY where that can not be seen."""
        try:
            found = regions_in(self.task, self.address, self._length)
        except (NotPrivilegedError, TaskGoneError, TimedOutError):
            return Access.READ_ONLY
        writable = found and all(region.access is Access.READ_WRITE for region in found)
        return Access.READ_WRITE if writable else Access.READ_ONLY

    def _regions(self, offset: int, length: int, access: Access) -> list[Region]:
        """The shared regions under a range, checked by the rules of the seed."""
        start = self.address + offset
        try:
            found = regions_in(self.task, start, length)
        except _REASONS as error:
            raise _not_seen(error) from error
        gaps = find_holes(found, start, length)
        if gaps:
            hole, size = gaps[0]
            raise MappingError(
                f"{size:,} bytes at {hole:#x} of task {self.task.pid} are not mapped there: "
                "describe only what is",
                reason=MappingReason.NOT_MAPPED,
                errno=errno.EFAULT,
            )
        if self.task.is_current and zone_map.contains(start, length):
            raise self._zone_memory(start, length)
        for region in found:
            self._check_region(region, access)
        if not self.allow_several_objects:
            self._check_one_object(found)
        return found

    def _check_region(self, region: Region, access: Access) -> None:
        where = f"{region.start:#x}-{region.end:#x} {region.path or 'anonymous memory'}"
        if not region.shared and region.path == f"[anon:{zone_map.NAME}]":
            raise self._zone_memory(region.start, region.length)
        if not region.shared or region.object.kind is ObjectKind.SPECIAL:
            raise MappingError(
                f"{where} of task {self.task.pid} is private memory, which no other task can map: "
                "copy it (copyin, copyout), or allocate it with a BufferMemoryDescriptor or "
                "mmap(MAP_SHARED | MAP_ANONYMOUS)",
                reason=MappingReason.PRIVATE_MEMORY,
                errno=errno.EACCES,
            )
        if region.access is None or not access.within(region.access):
            have = region.permissions[:3]
            raise MappingError(
                f"{where} of task {self.task.pid} is {have} there, {access.value} was asked for: "
                "ask for what the task itself may do",
                reason=MappingReason.ACCESS,
                errno=errno.EACCES,
            )

    def _zone_memory(self, start: int, length: int) -> MappingError:
        return MappingError(
            f"{length:,} bytes at {start:#x} of task {self.task.pid} are zone memory, which is "
            "private and never shared: copy it (copyin, copyout), or allocate what is to be shared "
            "with a BufferMemoryDescriptor or io_malloc_aligned",
            reason=MappingReason.ZONE_MEMORY,
            errno=errno.EACCES,
        )

    def _check_one_object(self, found: list[Region]) -> None:
        """The rule of Mac OS X 10.5: regions may be several, their object one and contiguous."""
        for before, after in pairwise(found):
            same = before.object == after.object
            if not same or before.offset + before.length != after.offset:
                what = "another VM object" if not same else "another part of its VM object"
                raise MappingError(
                    f"at {after.start:#x} the range goes over to {what} ({after.path}): say "
                    "allow_several_objects=True for one contiguous view of all, or allocate the "
                    "memory in one piece (Listing 2)",
                    reason=MappingReason.SEVERAL_OBJECTS,
                    errno=errno.EINVAL,
                )

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        start, end = self.address + offset, self.address + offset + length
        extents: list[Extent] = []
        objects: dict[tuple[int, int], MemoryObject] = {}
        for region in self._regions(offset, length, access):
            key = _identity(region)
            object_ = objects.get(key)
            if object_ is None:
                object_ = objects[key] = self._open(region, access, key)
            low, high = max(start, region.start), min(end, region.end)
            last = extents[-1] if extents else None
            if (
                last
                and last.object is object_
                and (last.offset + last.length == region.offset_of(low))
            ):
                extents[-1] = Extent(object_, last.offset, last.length + high - low)
            else:
                extents.append(Extent(object_, region.offset_of(low), high - low))
        return extents

    def _open(self, region: Region, access: Access, identity: tuple[int, int]) -> MemoryObject:
        owned = find_owned(identity)
        if owned is not None:
            return owned
        if not self.trust_size and identity[0] not in memory_devices():
            # Its name can be any, and who serves a file can keep waiting whoever opens it.
            raise MappingError(
                f"what lies at {region.start:#x} of task {self.task.pid} ({region.path!r}) is not "
                "memory but of a file system: its owner could truncate it, and the next access "
                "would kill this process with SIGBUS; have it in a sealed memfd, or say "
                "trust_size=True if its owner is trusted",
                reason=MappingReason.CAN_SHRINK,
                errno=errno.EPERM,
            )
        try:
            fd = open_object(self.task, region, access)
        except _REASONS as error:
            raise _not_seen(error) from error
        # Nobody holds a descriptor on shared anonymous memory, so nobody can truncate it. The name
        # alone does not tell it: a task can give a file that name in a mount namespace of its own.
        named_so = region.object.kind is ObjectKind.SHARED_ANONYMOUS
        anonymous = named_so and identity[0] == anonymous_device()
        return ForeignObject(
            fd,
            access,
            trust_size=self.trust_size or anonymous,
            user=self.task.credentials.uid,
        )

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        anywhere = placement.at_address is None and not placement.guard_pages
        if self.task.is_current and anywhere:
            return self._map_own(offset, length, access, placement)
        return map_extents(self._extents(offset, length, access), access, placement)

    def _map_own(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window:
        """A second mapping of this task's own shared memory: needs no descriptor of the object."""
        found = self._regions(offset, length, access)
        if len(found) > 1 or find_owned(_identity(found[0])):  # ours: its own rules decide
            return map_extents(self._extents(offset, length, access), access, placement)
        start, span = page_span(self.address + offset, length)
        with explained(span, placement):
            memory = _core.duplicate_memory(start, span)
            if not access.writable:
                _core.mprotect(memory.address, span, _core.PROT_READ)
            if placement.prefault:
                _core.madvise(memory.address, span, _core.MADV_POPULATE_READ)
        return _core.Window(memory, self.address + offset - start, length, access.writable)

    def _export(self) -> _core.Window | memoryview:
        self._check_open()
        with self._lock:
            if self._window is None:
                self._window = self.map(unique=True)._export()
            return self._window

    def _reader(self) -> Reader:
        def read(offset: int, into: memoryview) -> None:
            copyin_into(self.task, self.address + offset, into)

        return read

    def read_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out by copyin; works on private memory too."""
        self._check_open()
        offset, length = check_range(offset, length, self._length, "the descriptor")
        return copyin(self.task, self.address + offset, length)

    def _is_sealed(self) -> bool:
        return False  # copyout tells, and needs no mapping for it

    def _store(self, offset: int, source: memoryview) -> None:
        copyout(source, self.task, self.address + offset)

    def page_counts(self) -> PageCounts:
        """Count pages by the task's pagemap (own task: mincore)."""
        self._check_open()
        if self.task.is_current:
            start, span = page_span(self.address, self._length)
            resident = sum(flag & 1 for flag in _core.mincore(start, span))
            return PageCounts(span // page_size, resident)
        return super().page_counts()

    def _wire(self, direction: Direction) -> Callable[[], None]:
        if self.task.is_current:
            return wire(self.address, self._length, for_writing=direction.writes_memory).release
        try:
            window = self._export()
        except MappingError as error:
            raise WiringError(
                f"memory of task {self.task.pid} is wired through a mapping of it, which can not "
                f"be made: {error}",
                reason=WiringReason.OTHER_TASK,
                errno=error.errno,
            ) from error
        return wire(_core.buffer_address(window)[0], self._length, keep=window).release

    def _close(self) -> None:
        self._window = None


def _identity(region: Region) -> tuple[int, int]:
    """Device and inode as fstat tells them of the object's descriptor."""
    return os.makedev(*region.object.device), region.object.inode


@final
class PythonBufferDescriptor(MemoryDescriptor):
    """Describes the memory of a Python buffer of this task, and keeps the buffer alive.

    Whether other tasks can map it is the kernel's word: a view of a descriptor or mapping of ours
    can be, a bytearray can not (`PRIVATE_MEMORY`). In this task mapping it is an alias, as in the
    model: no new addresses.

    Parameters
    ----------
    buffer : buffer
        Contiguous (in C's order, if it has several dimensions), of at least one byte.
    direction : Direction
    """

    def __init__(self, buffer: Buffer, direction: Direction) -> None:
        self._view = bytes_of(buffer)
        check_length(self._view.nbytes, "the buffer's length")
        self.address = _core.buffer_address(self._view)[0]
        super().__init__(direction, type(buffer).__name__)

    @property
    def length(self) -> int:
        """Bytes described."""
        return self._view.nbytes if not self.closed else 0

    @property
    def max_access(self) -> Access:
        """As the buffer says of itself, and no more than a buffer of ours under it gives."""
        self._check_open()
        if self._view.readonly:
            return Access.READ_ONLY
        under = regions_in(Task.current(), self.address, self._view.nbytes)
        owned = [find_owned(_identity(region)) for region in under]
        return (
            Access.READ_ONLY
            if any(memory and not memory.max_access.writable for memory in owned)
            else Access.READ_WRITE
        )

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        self._check_open()
        within = AddressRangeDescriptor(self.address, self._view.nbytes, self.direction)
        return within._extents(offset, length, access)

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        if placement.unique or placement.at_address is not None or placement.guard_pages:
            return map_extents(self._extents(offset, length, access), access, placement)
        part = self._view[offset : offset + length]
        return part if access.writable else part.toreadonly()

    def _export(self) -> memoryview:
        self._check_open()
        return self._view

    def _wire(self, direction: Direction) -> Callable[[], None]:
        writes = direction.writes_memory
        return wire(self.address, self._view.nbytes, keep=self._view, for_writing=writes).release

    def _close(self) -> None:
        del self._view
