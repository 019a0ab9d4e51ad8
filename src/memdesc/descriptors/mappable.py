"""Mappable: the mapping half of a descriptor. It neither copies nor wires.

The kinds say where their bytes lie (`_extents`, `_export`); this makes them visible in tasks.
"""

from __future__ import annotations

import errno
import os
import weakref
from abc import ABC, abstractmethod

from memdesc import _core
from memdesc.descriptors.homes import note_home
from memdesc.errors import ClosedError, MappingError, MappingReason
from memdesc.mapping import (
    Extent,
    LocalMemoryMap,
    MemoryMap,
    Placement,
    RemoteMemoryMap,
    carrier_to,
    check_range,
    map_extents,
)
from memdesc.vm import tracing
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access
from memdesc.vm.task import Task, check_task
from memdesc.vm.timeouts import check_timeout


def _told(known: Mappable) -> tracing.Told:
    return None if known.closed else (known.name, known.length)


class Mappable(_core.Exporter, ABC):
    """What can be made visible in tasks; the base of `MemoryDescriptor`."""

    name: str

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = lock_for(self)
        self._closed = False
        self._mappings: weakref.WeakSet[MemoryMap] = weakref.WeakSet()
        if tracing.books is not None:
            tracing.books.note(self, _told)

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

    def _map_here(
        self, offset: int, length: int, access: Access, placement: Placement
    ) -> _core.Window | memoryview:
        """Make a window in this task. Kinds whose memory is no object of its own override it."""
        return map_extents(self._extents(offset, length, access), access, placement)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(
                f"{type(self).__name__} {self.name!r} was closed, by close() or the end of its "
                "with block: make a new one; mappings and views that exist stay"
            )

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
        placement = Placement(at_address, guard_pages, prefault, unique)
        return self._map_into_this_task(offset, length, access, placement, False)

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
            Keeps this descriptor alive. Ends by `unmap` or its ``with`` block; in this task also
            when it and its views are collected, in another one with the connection.

        Raises
        ------
        MappingError
            With its `reason`; see `docs/why-your-map-failed.md`.
        """
        self._check_reachable(task, timeout)
        placement = Placement(at_address, guard_pages, prefault, unique)
        if task.is_current:
            return self._map_into_this_task(offset, length, access, placement, reference)
        offset, length, access = self._check_push(task, offset, length, access, reference)
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

    async def create_mapping_in_task_async(
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
        """As `create_mapping_in_task`, for asyncio. Cancelled, nothing is left mapped there.

        Only this coroutine waits for the other task. In this task it maps at once, in the loop.
        """
        self._check_reachable(task, timeout)
        placement = Placement(at_address, guard_pages, prefault, unique)
        if task.is_current:
            return self._map_into_this_task(offset, length, access, placement, reference)
        offset, length, access = self._check_push(task, offset, length, access, reference)
        mapping = await carrier_to(task, connection).map_in_peer_async(
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

    def _check_reachable(self, task: Task, timeout: float | None) -> None:
        self._check_open()
        check_task(task)
        check_timeout(timeout)
        if not task.alive:
            raise MappingError(
                f"task {task.pid} has ended: nothing can be mapped into it",
                reason=MappingReason.TASK_GONE,
                errno=errno.ESRCH,
            )

    def _check_push(
        self, task: Task, offset: int, length: int | None, access: Access | None, reference: bool
    ) -> tuple[int, int, Access]:
        """Check what is to be mapped in another task: (offset, length, access)."""
        offset, length = self._check_map_range(offset, length)
        access = self._check_map_access(access)
        if reference:
            raise self._nothing_to_refer_to(task.pid)
        return offset, length, access

    def _map_into_this_task(
        self,
        offset: int,
        length: int | None,
        access: Access | None,
        placement: Placement,
        reference: bool,
    ) -> LocalMemoryMap:
        offset, length = self._check_map_range(offset, length)
        access = self._check_map_access(access)
        with self._lock:
            mapping = self._lend(offset, length, access, placement)
            if mapping is None:
                if reference:
                    raise self._nothing_to_refer_to(os.getpid())
                window = self._map_here(offset, length, access, placement)
                note_home(window, self, offset)
                mapping = LocalMemoryMap(
                    window,
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
        access = most if access is None else Access(access)
        if not access.within(most):
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
        if placement.unique or placement.prefault:
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
