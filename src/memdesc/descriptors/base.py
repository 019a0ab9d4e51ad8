"""MemoryDescriptor: describes memory. Mapping makes it visible, wiring keeps it resident.

The one abstract base. The kinds differ in five hooks: `length`, `max_access`, `_extents`, `_export`
and `_wire`. The base never looks which kind it is; only the named constructors at the end name two.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from memdesc import _core
from memdesc.errors import (
    ClosedError,
    MappingError,
    MappingReason,
    NotPreparedError,
    SealedError,
    WiringError,
    WiringReason,
)
from memdesc.mapping import (
    Extent,
    LocalMemoryMap,
    MemoryMap,
    Placement,
    RemoteMemoryMap,
    carrier_to,
    check_range,
    map_extents,
    view_as_array,
)
from memdesc.vm.pages import Access, Direction, page_size, page_span
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on


def _nothing() -> None:
    """What undoes a wiring that there is not."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages that a descriptor touches, and how many of them are in memory now."""

    total: int
    resident: int


class MemoryDescriptor(_core.Exporter, ABC):
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
    name: str

    def __init__(self, direction: Direction, name: str) -> None:
        self.direction = Direction(direction)
        self.name = name
        self._lock = threading.RLock()
        self._closed = False
        self._mappings: weakref.WeakSet[MemoryMap] = weakref.WeakSet()
        self._prepared: list[Direction] = []
        self._undo_wiring: Callable[[], None] = _nothing

    # -- the hooks -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def length(self) -> int:
        """Bytes described."""

    @property
    @abstractmethod
    def max_access(self) -> Access:
        """The most that any mapping of it gives."""

    @abstractmethod
    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        """Where the bytes lie in VM objects, or MappingError with the reason why in none."""

    @abstractmethod
    def _export(self) -> _core.Window | memoryview:
        """The bytes in this task."""

    @abstractmethod
    def _wire(self, direction: Direction) -> Callable[[], None]:
        """Wire all of it and give what undoes that; `WiringError`, with nothing left wired."""

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        """Make a window in this task. Kinds whose memory is no object of its own override it."""
        return map_extents(self._extents(offset, length, access), access, placement)

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
        """Copy bytes in. Nothing is clipped: out of range is `RangeError`.

        Raises
        ------
        RangeError
        SealedError
            The memory is read-only (EACCES).
        WiringError
            NOT_WRITABLE: it is prepared for reading only (direction OUT), as in I/O Kit.
        """
        self._check_open()
        source = memoryview(data).cast("B")
        offset, length = check_range(offset, source.nbytes, self.length, "the descriptor")
        self._check_writable("written")
        if length:
            self._store(offset, source)

    def _store(self, offset: int, source: memoryview) -> None:
        target = memoryview(self)
        if target.readonly:
            raise SealedError(
                f"{self.name!r} is read-only in this task: only its owner writes it",
                errno=errno.EACCES,
            )
        _core.copy_memory(target[offset : offset + source.nbytes], source)

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
        resident = sum(flag & 1 for flag in _core.mincore(start, span, page_size))
        return PageCounts(span // page_size, resident)

    # -- mapping ---------------------------------------------------------------------------------

    def map(
        self,
        *,
        offset: int = 0,
        length: int | None = None,
        access: Access | None = None,
        prefault: bool = False,
        guard_pages: int = 0,
        unique: bool = False,
        at_address: int | None = None,
    ) -> LocalMemoryMap:
        """Map into this task: the short form of `create_mapping_in_task`."""
        self._check_open()
        placement = Placement(at_address, guard_pages, prefault)
        return self._map_into_this_task(offset, length, access, placement, unique, False)

    def create_mapping_in_task(
        self,
        task: Task,
        *,
        offset: int = 0,
        length: int | None = None,
        access: Access | None = None,
        prefault: bool = False,
        guard_pages: int = 0,
        unique: bool = False,
        reference: bool = False,
        at_address: int | None = None,
        enforced: bool = True,
        connection: object | None = None,
        timeout: float | None = 5.0,
    ) -> MemoryMap:
        """Make the memory visible in a task (I/O Kit: createMappingInTask).

        Whole pages are mapped underneath; the address keeps the offset inside its page. Mapping
        does not wire, and lives on after `complete`.

        Parameters
        ----------
        task : Task
            This task, or one that is connected to it.
        offset, length : int
            Bytes of the descriptor; by default to its end.
        access : Access, optional
            By default the most that `max_access` allows; more is an error.
        prefault : bool
            Fault all pages in before returning.
        guard_pages : int
            Pages without access on each side.
        unique : bool
            Always new addresses. By default a mapping in this task that covers the range with the
            same access and guards lends its addresses; in another task they are always new.
        reference : bool
            Only such a lending: NO_SUCH_MAPPING where there is none.
        at_address : int, optional
            Exactly there, page-aligned; nothing that is mapped is ever replaced.
        enforced : bool
            False accepts read-only as a courtesy, on memory that is READ_WRITE for its holders.
        connection : optional
            Which connection to the task, where several exist.
        timeout : float, optional
            Seconds to wait for another task's answer; None waits for ever.

        Returns
        -------
        LocalMemoryMap or RemoteMemoryMap
            Keeps this descriptor alive. Ends by `unmap`, by its ``with`` block, or when it and
            its views are collected.

        Raises
        ------
        MappingError
            With its `reason`; see `docs/why-your-map-failed.md`.
        """
        self._check_open()
        placement = Placement(at_address, guard_pages, prefault)
        if not task.alive:
            raise MappingError(
                f"task {task.pid} has ended: nothing can be mapped into it",
                reason=MappingReason.TASK_GONE,
                errno=errno.ESRCH,
            )
        if task.is_current:
            return self._map_into_this_task(offset, length, access, placement, unique, reference)
        offset, length = self._check_map_range(offset, length)
        access = self._check_map_access(access)
        if reference:
            raise self._nothing_to_refer_to(task.pid)
        mapping = carrier_to(task, connection).map_in_peer(
            self._extents(offset, length, access),
            access=access,
            enforced=enforced,
            placement=placement,
            offset=offset,
            owner=self,
            timeout=timeout,
        )
        self._mappings.add(mapping)
        return mapping

    def _map_into_this_task(
        self,
        offset: int,
        length: int | None,
        access: Access | None,
        placement: Placement,
        unique: bool,
        reference: bool,
    ) -> LocalMemoryMap:
        offset, length = self._check_map_range(offset, length)
        access = self._check_map_access(access)
        with self._lock:
            mapping = None if unique else self._lend(offset, length, access, placement)
            if mapping is None:
                if reference:
                    raise self._nothing_to_refer_to(os.getpid())
                mapping = LocalMemoryMap(
                    self._map_here(offset, length, access, placement),
                    offset=offset,
                    access=access,
                    guard_pages=placement.guard_pages,
                    owner=self,
                )
            self._mappings.add(mapping)
        return mapping

    def _nothing_to_refer_to(self, pid: int) -> MappingError:
        return MappingError(
            f"no mapping of this range of {self.name!r} in task {pid} could be lent: leave out "
            "reference=True to make one",
            reason=MappingReason.NO_SUCH_MAPPING,
            errno=errno.ENOENT,
        )

    def _check_map_range(self, offset: int, length: int | None) -> tuple[int, int]:
        try:
            offset, length = check_range(offset, length, self.length, "the descriptor")
        except IndexError as error:
            raise MappingError(
                f"can not map {self.name!r}: {error}",
                reason=MappingReason.OUT_OF_RANGE,
                errno=errno.EINVAL,
            ) from error
        if length == 0:
            raise MappingError(
                f"can not map 0 bytes of {self.name!r} (length {self.length:,}): a mapping has at "
                "least one byte",
                reason=MappingReason.ZERO_LENGTH,
                errno=errno.EINVAL,
            )
        return offset, length

    def _check_map_access(self, access: Access | None) -> Access:
        most = self.max_access
        if access is None:
            return most
        if not Access(access).within(most):
            raise MappingError(
                f"{self.name!r} gives {most.value} at most, {access.value} was asked for: make "
                "the buffer with max_access=READ_WRITE; its owner writes through the buffer itself",
                reason=MappingReason.ACCESS,
                errno=errno.EACCES,
            )
        return access

    def _lend(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> LocalMemoryMap | None:
        """A mapping on the addresses of one that exists in this task and covers the range."""
        if placement.prefault:
            return None
        for known in list(self._mappings):
            if not isinstance(known, LocalMemoryMap) or known.guard_pages != placement.guard_pages:
                continue
            part = known.part(offset, length, access)
            if part and placement.at_address in (None, part.address):
                return part
        return None

    def mappings(self) -> list[LocalMemoryMap | RemoteMemoryMap]:
        """List the mappings of this descriptor that exist, in whatever task."""
        return [m for m in list(self._mappings) if m.is_mapped]  # type: ignore[misc]

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

    def _unwire(self) -> None:
        undo, self._undo_wiring = self._undo_wiring, _nothing
        undo()

    # -- lifetime --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name!r} was closed")

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
