"""MemoryDescriptor: describes memory. Mapping makes it visible, wiring keeps it resident.

The one abstract base: bytes and wiring here, mapping in `Mappable`. The kinds differ in hooks:
`length`, `max_access`, `_extents`, `_export` and `_wire`, some in `_freeze`. The base never looks
which kind it is; only `snapshot` and the named constructors at the end name what they make.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.descriptors.mappable import Mappable
from memdesc.descriptors.statistics import DescriptorStatistics
from memdesc.errors import InvalidArgument, NotPreparedError, SealedError, WiringError, WiringReason
from memdesc.mapping import GivesArrays, LocalMemoryMap, check_range, view_as_array
from memdesc.vm.pages import Direction, page_size, page_span
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    from memdesc.descriptors.freezing import Frozen, Reader
    from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
    from memdesc.vm.physical import PhysicalSegment


def _nothing() -> None:
    """What undoes a wiring that there is not."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages that a descriptor touches, and how many of them are in memory now."""

    total: int
    resident: int


class MemoryDescriptor(GivesArrays, Mappable):
    """Describes memory (I/O Kit: IOMemoryDescriptor).

    Every descriptor gives the buffer protocol; views keep the memory alive. Leaving a ``with``
    block closes it: no new views, mappings or grants; what exists goes on until its last holder
    lets go.

    Attributes
    ----------
    direction : Direction
        Which way data moves, as the device sees it; `prepare` follows it.
    name : str

    Notes
    -----
    Threads: safe. Fork: the child inherits the descriptor with its mappings, but no wiring and
    no connection.
    """

    direction: Direction

    def __init__(self, direction: Direction, name: str) -> None:
        super().__init__(name)
        self.direction = Direction(direction)
        self._prepared: list[Direction] = []
        self._undo_wiring: Callable[[], None] = _nothing

    # -- the hooks -------------------------------------------------------------------------------

    @abstractmethod
    def _wire(self, direction: Direction) -> Callable[[], None]:
        """Wire all of it and give what undoes that; `WiringError`, with nothing left wired."""

    def _freeze(self, offset: int, length: int) -> Frozen:
        """Make a part immutable. Kinds that can do it without copying all of it override it."""
        from memdesc.descriptors.copy_on_write import SnapshotReason
        from memdesc.descriptors.freezing import copied

        read = self._reader()
        return copied(
            lambda at, into: read(offset + at, into),
            length,
            SnapshotReason.NOT_OWNED,
            name=self.name,
        )

    def _reader(self) -> Reader:
        """What copies bytes out, in several threads: every aligned word of 8 bytes at once."""
        view = memoryview(self).toreadonly()

        def read(offset: int, into: memoryview) -> None:
            with view[offset : offset + into.nbytes] as part:
                _core.copy_words(into, part)

        return read

    def _close(self) -> None:
        """Let go of what the kind holds. Called once."""

    # -- bytes -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.length

    def read_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out. Nothing is clipped: out of range is `RangeError`.

        I/O Kit: readBytes, which answers 0 there; neither asks for `prepare` first here.
        """
        self._check_open()
        offset, length = check_range(offset, length, self.length, "the descriptor")
        if length == 0:
            return b""
        into = bytearray(length)
        _core.copy_memory(into, memoryview(self)[offset : offset + length])
        return bytes(into)

    def write_bytes(self, offset: int, data: Buffer) -> None:
        """Copy bytes in. Nothing is clipped: out of range is `RangeError`, and nothing written.

        Raises
        ------
        RangeError
        InvalidArgument
            `data` is no contiguous buffer.
        SealedError
            The memory is read-only (EACCES).
        WiringError
            NOT_WRITABLE: it is prepared for reading only (direction OUT), as in I/O Kit.
        """
        self._check_open()
        source = bytes_of(data)
        offset, length = check_range(offset, source.nbytes, self.length, "the descriptor")
        if length:
            self._check_store(offset, length)
            self._store(offset, source)

    def _check_store(self, offset: int, length: int) -> None:
        """Raise if not all of a range can be written, before any of it is."""
        self._check_open()
        self._check_writable("written")
        if self._is_sealed():
            raise SealedError(
                f"{self.name!r} is read-only in this task: only its owner writes it",
                errno=errno.EACCES,
            )

    def _is_sealed(self) -> bool:
        """Whether this task can not write it."""
        return memoryview(self).readonly

    def _store(self, offset: int, source: memoryview) -> None:
        _core.copy_memory(memoryview(self)[offset : offset + source.nbytes], source)

    def _check_writable(self, doing: str) -> None:
        if self._prepared and self._prepared[0] is Direction.OUT:
            raise WiringError(
                f"{self.name!r} is prepared for reading only (direction OUT) and can not be "
                f"{doing}: complete() it first, or prepare it with direction OUT_IN",
                reason=WiringReason.NOT_WRITABLE,
                errno=errno.EACCES,
            )

    def array(
        self,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        order: str = "C",
        offset: int = 0,
    ) -> np.ndarray[Any, Any]:
        """View the pages themselves as a NumPy array.

        Parameters and errors as of `memdesc.mapping.view_as_array`.
        """
        self._check_open()
        return view_as_array(self, self.length, shape, dtype, order=order, offset=offset)

    def page_counts(self) -> PageCounts:
        """Count pages, in memory and in all (I/O Kit: getPageCounts, without dirty pages).

        Linux: mincore over this task's view; the kernel answers for the object, whoever touched
        the pages.
        """
        address, nbytes, _ = _core.buffer_address(memoryview(self))
        start, span = page_span(address, nbytes)
        resident = sum(flag & 1 for flag in _core.mincore(start, span))
        return PageCounts(span // page_size, resident)

    # -- snapshots -------------------------------------------------------------------------------

    def snapshot(self) -> SnapshotMemoryDescriptor:
        """Give the bytes as they are now, for ever: an immutable descriptor of its own.

        What is stored here afterwards is not in it, and nobody can store there. Whether bytes
        are copied is told (`copied_bytes`, `reason`) and changes nothing else: of a buffer that
        no one else ever saw no byte is copied; by later snapshots of it what changed since that
        first one, or all where that is more than half; of everything else all. This descriptor
        stays what it is: writable, its views valid.

        Returns
        -------
        SnapshotMemoryDescriptor
            Owned by the caller.

        Raises
        ------
        InvalidArgument
            It describes 0 bytes.
        AllocationError
            There is no memory for what has to be copied.
        MappingError
            It can not be mapped here, as which a snapshot is read; or, of memory of another task,
            nor copied.

        Notes
        -----
        Linux: mremap of a private mapping over the view, F_SEAL_WRITE, PAGEMAP_SCAN; no privilege.
        Threads that store meanwhile, and fork: see `docs/snapshots.md`.

        Examples
        --------
        >>> from memdesc import BufferMemoryDescriptor
        >>> with BufferMemoryDescriptor(100) as buffer:
        ...     buffer.write_bytes(0, b"then")
        ...     frozen = buffer.snapshot()
        ...     buffer.write_bytes(0, b"now ")
        ...     frozen.read_bytes(0, 4), frozen.copied_bytes
        (b'then', 0)
        """
        from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor

        self._check_open()
        length = self.length
        if not length:
            raise InvalidArgument(
                f"{self.name!r} describes 0 bytes: there is nothing to take a snapshot of",
                errno=errno.EINVAL,
            )
        return SnapshotMemoryDescriptor(self._freeze(0, length), name=self.name)

    # -- wiring ----------------------------------------------------------------------------------

    @property
    def prepare_count(self) -> int:
        """How many `prepare` await their `complete`."""
        return len(self._prepared)

    def prepare(self, direction: Direction | None = None) -> None:
        """Keep the memory resident until the matching `complete`. Counted; only the first wires.

        Parameters
        ----------
        direction : Direction, optional
            The descriptor's own by default. OUT asks for read access only.

        Raises
        ------
        WiringError
            With its `reason`; nothing of this call stays wired and the count is unchanged.
            NOT_WRITABLE: the first prepare was for reading (OUT), this one wants to write.

        Notes
        -----
        I/O Kit: IOMemoryDescriptor::prepare, with its rules of nesting. Linux: mlock, which asks
        for CAP_IPC_LOCK or room under RLIMIT_MEMLOCK. Wired pages may still move between frames.
        """
        self._check_open()
        direction = self.direction if direction is None else Direction(direction)
        with self._lock:
            if self._prepared:
                if direction.writes_memory:
                    self._check_writable(f"prepared for {direction.name}")
            else:
                self._undo_wiring = self._wire(direction)
            self._prepared.append(direction)

    def complete(self) -> None:
        """Undo one `prepare`; the last one unwires.

        Raises
        ------
        NotPreparedError
            There is none to undo (I/O Kit says nothing there).
        """
        with self._lock:
            if not self._prepared:
                raise NotPreparedError(f"complete() of {self.name!r} without a prepare() before it")
            self._prepared.pop()
            if not self._prepared:
                self._unwire()

    @contextmanager
    def prepared(self, direction: Direction | None = None) -> Iterator[Self]:
        """Prepare for the length of a ``with`` block."""
        self.prepare(direction)
        try:
            yield self
        finally:
            self.complete()

    def physical_segments(
        self, offset: int = 0, length: int | None = None
    ) -> list[PhysicalSegment]:
        """Tell where prepared memory physically lies: (address, length), merged into runs.

        They hold while nobody moves the pages: wired memory is not paged out, but the kernel may
        move it to other frames. For a device pin it: `memdesc.dma.DMACommand`.

        Raises
        ------
        NotPreparedError
            It is not prepared.
        NotPrivilegedError
            This process is not shown page frames (EPERM).

        Notes
        -----
        Linux: /proc/self/pagemap, CAP_SYS_ADMIN. I/O Kit: getPhysicalSegment.
        """
        self._check_open()
        offset, length = check_range(offset, length, self.length, "the descriptor")
        if not self._prepared:
            raise NotPreparedError(
                f"{self.name!r} is not prepared, so its pages lie anywhere or nowhere: prepare() "
                "it first, or use a DMACommand"
            )
        from memdesc.vm.physical import physical_runs

        address = _core.buffer_address(memoryview(self))[0]
        return physical_runs([(address + offset, length)]) if length else []

    def _unwire(self) -> None:
        undo, self._undo_wiring = self._undo_wiring, _nothing
        undo()

    # -- lifetime --------------------------------------------------------------------------------

    def statistics(self) -> DescriptorStatistics:
        """Tell what it has now: mappings, and what keeps it resident.

        Raises
        ------
        ClosedError
        """
        self._check_open()
        mappings = self.mappings()
        here = [mapping for mapping in mappings if isinstance(mapping, LocalMemoryMap)]
        return DescriptorStatistics(
            name=self.name,
            nbytes=self.length,
            mappings=len(here),
            mapped_bytes=sum(mapping.length for mapping in here),
            remote_mappings=len(mappings) - len(here),
            prepares=len(self._prepared),
        )

    def close(self) -> None:
        """Let go: completes what is prepared, gives no new views. Again is a no-op.

        Never raises for views or mappings that are alive: the memory goes with the last of them.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._prepared.clear()
            self._unwire()
            self._close()

    def __del__(self) -> None:
        # What was prepared through others (the whole of a part) does not end with this object.
        if getattr(self, "_prepared", None):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.length:,} bytes, {self.max_access.value}"
        return f"<{type(self).__name__} {self.name!r}: {state}>"

    # -- the named constructors of the model -------------------------------------------------------

    @staticmethod
    def with_address_range(
        address: int,
        length: int,
        direction: Direction,
        task: Task | None = None,
        *,
        allow_several_objects: bool = False,
        trust_size: bool = False,
    ) -> MemoryDescriptor:
        """Describe memory that lies in a task; see `AddressRangeDescriptor`."""
        from memdesc.descriptors.address_range import AddressRangeDescriptor as Kind

        rules = {"allow_several_objects": allow_several_objects, "trust_size": trust_size}
        return Kind(address, length, direction, task, **rules)

    @staticmethod
    def with_buffer(buffer: Buffer, direction: Direction) -> MemoryDescriptor:
        """Describe the memory of any contiguous Python buffer of this task, and keep it alive."""
        from memdesc.descriptors.address_range import PythonBufferDescriptor

        return PythonBufferDescriptor(buffer, direction)


def check_descriptor(value: object, what: str) -> MemoryDescriptor:
    """Give a descriptor back, else raise `InvalidArgument` with what to do."""
    if isinstance(value, MemoryDescriptor):
        return value
    from memdesc.descriptors.homes import home_of

    advice = (
        "MemoryDescriptor.with_buffer(…) describes a buffer or array that exists already, and "
        "`block.descriptor` a block of io_malloc_aligned or io_malloc_contiguous"
    )
    if hasattr(value, "__array_interface__"):
        advice = "md.descriptor_of(md.asarray(array)) gives one of a copy of this array"
        if home_of(value) is not None:
            advice = "this array lies in one: md.descriptor_of(array) gives it"
    elif hasattr(value, "__arrow_c_stream__"):  # a table of PyArrow, a data frame
        advice = "memdesc.interop.arrow.to_descriptor(table) writes a table into one"
    raise InvalidArgument(
        f"{what} is of type {type(value).__name__}: give a MemoryDescriptor; {advice}",
        errno=errno.EINVAL,
    )
