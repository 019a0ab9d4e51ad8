"""MemoryMap: memory of a descriptor, visible in one task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, final

from memdesc import _core
from memdesc.errors import ClosedError
from memdesc.mapping.views import GivesArrays, check_range, view_as_array
from memdesc.vm import tracing
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access
from memdesc.vm.task import Task
from memdesc.vm.timeouts import check_timeout
from memdesc.wiring import Wire, wire

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class MappingStatistics:
    """What a mapping in this task has now.

    Attributes
    ----------
    nbytes : int
        Mapped; 0 once it has ended.
    views : int
        Arrays and memoryviews that count as this mapping's own: while there are any, `unmap`
        raises.
    wires, wired_bytes : int
        Tokens that `wire` gave and which hold, and their bytes.
    """

    nbytes: int
    views: int
    wires: int
    wired_bytes: int


class MemoryMap(ABC):
    """Memory of a descriptor, visible in one task (I/O Kit: IOMemoryMap).

    Made by `MemoryDescriptor.map` and `create_mapping_in_task`. In this task it is a
    `LocalMemoryMap`, a buffer; in another it is a `RemoteMemoryMap`, a handle. It keeps its
    descriptor alive. Leaving a ``with`` block ends it.

    Attributes
    ----------
    address : int
        Of the first byte, in that task; keeps the offset inside its page. Not to be
        dereferenced in another task.
    length : int
        Bytes, as asked for: not rounded to pages.
    access : Access
    offset : int
        Of the first byte, in the descriptor.
    """

    address: int
    length: int
    access: Access
    offset: int

    @property
    @abstractmethod
    def task(self) -> Task:
        """Whose address space it is in."""

    @property
    @abstractmethod
    def is_mapped(self) -> bool:
        """Whether it still is."""

    @abstractmethod
    def unmap(self) -> None:
        """End it now. Again is a no-op.

        Raises
        ------
        BufferError
            Views of it are alive; nothing was unmapped.
        """

    async def unmap_async(self) -> None:
        """As `unmap`, for asyncio: one in another task is waited for by this coroutine alone."""
        self.unmap()

    @abstractmethod
    def _let_go(self) -> None:
        """End it as soon as no view needs it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._let_go()

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        state = "" if self.is_mapped else ", unmapped"
        return (
            f"<{type(self).__name__} {self.length:,} bytes at {self.address:#x} "
            f"in task {self.task.pid}, {self.access.value}{state}>"
        )


@final
class LocalMemoryMap(MemoryMap, GivesArrays, _core.Exporter):
    """A mapping in this task: a buffer whose views keep the memory alive.

    Threads: safe. Fork: the child inherits it (the same trust domain).
    """

    def __init__(
        self,
        window: _core.Window | memoryview,
        *,
        offset: int,
        access: Access,
        guard_pages: int = 0,
        owner: object,
        layout: tuple[tuple[int, ...] | None, str, str] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.address = _core.buffer_address(window)[0]
        self.length = len(window)
        self.access = access
        self.offset = offset
        self.guard_pages = guard_pages
        self.layout = layout
        self._window: _core.Window | memoryview | None = window
        self._owner = owner
        self._ended = ended
        self._wires: list[Wire] = []
        self._lock = lock_for(self)
        if tracing.books is not None:
            tracing.books.note(self, _told)

    @property
    def task(self) -> Task:
        """This task."""
        return Task.current()

    @property
    def is_mapped(self) -> bool:
        """Whether `unmap` was not called, nor the block left."""
        return self._window is not None

    def _export(self) -> _core.Window | memoryview:
        window = self._window
        if window is None:
            raise ClosedError(
                f"the mapping of {self.length:,} bytes at {self.address:#x} was unmapped, by "
                "unmap() or the end of its with block: map again, or keep the array instead"
            )
        return window

    def part(self, offset: int, length: int, access: Access) -> LocalMemoryMap | None:
        """Give a mapping of `length` bytes at the descriptor's `offset` on the same addresses.

        None where this one is unmapped or does not cover it (I/O Kit: a compatible mapping).
        """
        window = self._window
        start = offset - self.offset
        covers = start >= 0 and start + length <= self.length and access is self.access
        if window is None or not covers:
            return None
        part: _core.Window | memoryview
        if isinstance(window, _core.Window):
            part = _core.Window(window.memory, window.offset + start, length, access.writable)
        else:
            part = window[start : start + length]
        return LocalMemoryMap(
            part,
            offset=offset,
            access=access,
            guard_pages=self.guard_pages,
            owner=self._owner,
            layout=self.layout if length == self.length else None,
        )

    def array(
        self,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        order: str = "C",
        offset: int = 0,
    ) -> np.ndarray[Any, Any]:
        """View the pages as a NumPy array; see `view_as_array`."""
        if shape is None and dtype is None and self.layout is not None:
            shape, dtype, order = self.layout
        return view_as_array(self, self.length, shape, dtype, order=order, offset=offset)

    def wire(self, offset: int = 0, length: int | None = None) -> Wire:
        """Keep a part resident until the token is released or the mapping ends.

        I/O Kit: IOMemoryMap::wireRange. Linux: mlock; see `memdesc.wiring`.

        Raises
        ------
        WiringError, RangeError
        """
        offset, length = check_range(offset, length, self.length, "the mapping")
        with self._lock:
            self._export()
            token = wire(self.address + offset, length, keep=self._window)
            self._wires = [held for held in self._wires if not held.released] + [token]
        return token

    def statistics(self) -> MappingStatistics:
        """Tell who looks at it, and what of it is wired; of an ended one too."""
        with self._lock:
            window = self._window
            held = [token for token in self._wires if not token.released]
        return MappingStatistics(
            nbytes=0 if window is None else self.length,
            views=window.exports if isinstance(window, _core.Window) else 0,
            wires=len(held),
            wired_bytes=sum(token.length for token in held),
        )

    def unmap(self) -> None:
        """End the mapping; `BufferError` while views of it are alive."""
        with self._lock:
            window = self._window
            if window is None:
                return
            if isinstance(window, memoryview):
                window.release()
            elif window.exports:
                raise self._in_use(window)
            self._drop()

    def _in_use(self, window: _core.Window) -> BufferError:
        return tracing.blamed(
            BufferError(
                f"the mapping at {self.address:#x} has {window.exports} live view(s), arrays or "
                "memoryviews: delete them first, or leave a with block instead"
            ),
            views_of=window,
        )

    def _let_go(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()  # before the addresses go: who looks at our maps then knows why
        for token in self._wires:
            token.release()
        self._wires.clear()
        self._window = None
        self._owner = None


def _told(mapping: LocalMemoryMap | RemoteMemoryMap) -> tracing.Told:
    if not mapping.is_mapped:
        return None
    return getattr(mapping._owner, "name", ""), mapping.length


class Unmapper(Protocol):
    """What a handle needs of the connection that made it."""

    @property
    def task(self) -> Task:
        """The task that it reaches."""

    def has_mapping(self, token: int) -> bool:
        """Whether that mapping is still in the books."""

    def unmap_in_peer(self, token: int, timeout: float | None) -> None:
        """End it, or raise `BufferError`."""

    async def unmap_in_peer_async(self, token: int, timeout: float | None) -> None:
        """End it without stopping the event loop, or raise `BufferError`."""

    def release_in_peer(self, token: int) -> None:
        """End it when the peer's views are gone; does not wait."""


@final
class RemoteMemoryMap(MemoryMap):
    """A mapping in another task: an address there, and the means to unmap it.

    Attributes
    ----------
    verified : bool or None
        Whether that task's maps show our object at `address`; None where the kernel does not let
        us look (then the address is that task's claim).
    """

    def __init__(
        self,
        carrier: Unmapper,
        token: int,
        *,
        address: int,
        length: int,
        access: Access,
        offset: int,
        verified: bool | None,
        owner: object,
    ) -> None:
        self.address = address
        self.length = length
        self.access = access
        self.offset = offset
        self.verified = verified
        self._carrier = carrier
        self._token: int | None = token
        self._owner = owner
        if tracing.books is not None:
            tracing.books.note(self, _told)

    @property
    def task(self) -> Task:
        """Whose address space it is in."""
        return self._carrier.task

    @property
    def is_mapped(self) -> bool:
        """Whether it was neither unmapped by us, nor by that task, nor ended with it."""
        return self._token is not None and self._carrier.has_mapping(self._token)

    def unmap(self, timeout: float | None = 5.0) -> None:
        """Ask the task to unmap it; `BufferError` while its program holds views."""
        check_timeout(timeout)
        if self._token is not None and self.is_mapped:
            self._carrier.unmap_in_peer(self._token, timeout)
        self._token = None
        self._owner = None

    async def unmap_async(self, timeout: float | None = 5.0) -> None:
        """As `unmap`, for asyncio. Cancelled, that task does it all the same."""
        check_timeout(timeout)
        if self._token is not None and self.is_mapped:
            await self._carrier.unmap_in_peer_async(self._token, timeout)
        self._token = None
        self._owner = None

    def _let_go(self) -> None:
        token, self._token = self._token, None
        self._owner = None
        if token is not None:
            self._carrier.release_in_peer(token)
