"""BufferMemoryDescriptor: memory of our own, made to be shared."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, final

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.descriptors.base import MemoryDescriptor, _nothing
from memdesc.descriptors.homes import note_home
from memdesc.descriptors.statistics import BufferStatistics
from memdesc.errors import InvalidArgument, PageKindError, RangeError
from memdesc.mapping import Extent
from memdesc.memory.allocation import Allocation, Request, allocate
from memdesc.memory.kept import Contents
from memdesc.memory.lifecycle import State
from memdesc.memory.made_of import MadeOf, look
from memdesc.memory.memfd import OwnedObject, check_name
from memdesc.memory.page_kinds import PageKind, transparent_page_size
from memdesc.vm.pages import (
    Access,
    Direction,
    check_alignment,
    check_integer,
    check_length,
    page_size,
    round_page,
)
from memdesc.wiring import wire

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    from memdesc.descriptors.freezing import Frozen


class LengthWatcher(Protocol):
    """What wants to know when a buffer's length changes."""

    def length_changed(self) -> None:
        """Note it; never wait."""


@final
class BufferMemoryDescriptor(MemoryDescriptor):
    """Allocates memory that can be shared (I/O Kit: IOBufferMemoryDescriptor).

    A sealed memfd, mapped writable into this task, its owner. All others get at most
    `max_access`; the kernel enforces it from the first grant on, for root too.

    Parameters
    ----------
    capacity : int
        Bytes, at least 1. What is allocated is rounded up to pages; the rest of the last page is
        zero and in no view.
    direction : Direction
    max_access : Access
        What others get at most. Decided once: seals can not be undone.
    alignment : int
        Of the address in this task: a power of two. Below a page it is a page.
    lazy : bool
        Take pages at the first touch instead of now. Then a full machine is the out-of-memory
        killer, or SIGBUS on huge pages, in the middle of a store; without it, it is
        `AllocationError` here.
    wired : bool
        Keep it resident from the start (see `prepare`) until it is closed.
    pages : PageKind
        What to make it of; `page_kind` tells what came of it. AUTO takes huge pages where they
        cost no time, and never fails for the lack of them; the others are taken at their word.
        HUGE is shared read-only. See `docs/pages.md`.
    contents : Contents
        UNDEFINED spares clearing memory of an earlier buffer: for who fills all of it at once.
    recycle : bool
        Whether it may be made of the memory of an earlier buffer, and be kept for a later one
        (see `docs/recycling.md`).
    reserve : int, optional
        Bytes of addresses to keep for `grow`; the capacity at least, and by default. No memory is
        taken for what is past the capacity, except of HUGE pages, which the pool promises at
        once. Such a buffer is not recycled, and AUTO takes no HUGE pages for it.
    name : str
        Shows in every task's maps file as ``/memfd:name``.

    Attributes
    ----------
    capacity : int
        Only `grow` changes it. `length`, what the descriptor describes, is at first the capacity;
        `set_length` moves it.
    reserve : int
        What the capacity can grow to.
    pages : PageKind
        As asked for.
    moves, moved_bytes : int
        How often the buffer had to move to new memory since a snapshot shares its old one
        (`docs/snapshots.md`), and the bytes copied for that. Each is logged as ``buffer.moved``.

    Raises
    ------
    InvalidArgument
    AllocationError
        ENOMEM, ENOSPC, EMFILE: with `requested` and `available`.
    PageKindError
        HUGE or TRANSPARENT_HUGE pages are not to be had (ENOMEM, EINVAL).
    WiringError
        Only with `wired`; nothing stays allocated.

    Notes
    -----
    Linux: memfd_create, fallocate, MADV_POPULATE_WRITE; no privilege. Allocation is checked
    against MemAvailable and the memory cgroup before each 64 MiB; between the check and the pages
    others may still take them.

    Examples
    --------
    >>> from memdesc import BufferMemoryDescriptor
    >>> with BufferMemoryDescriptor(100) as buffer:
    ...     buffer.write_bytes(0, b"hello")
    ...     buffer.read_bytes(0, 5)
    b'hello'
    """

    def __init__(
        self,
        capacity: int,
        *,
        direction: Direction = Direction.OUT_IN,
        max_access: Access = Access.READ_ONLY,
        alignment: int = page_size,
        lazy: bool = False,
        wired: bool = False,
        pages: PageKind = PageKind.AUTO,
        contents: Contents = Contents.ZEROED,
        recycle: bool = True,
        reserve: int | None = None,
        name: str = "memdesc",
    ) -> None:
        super().__init__(direction, check_name(name))
        self._allocation: Allocation | None = None
        self._fixed: MadeOf | None = None
        self.moves = self.moved_bytes = 0
        self.capacity = self._length = check_length(capacity, "capacity")
        self.reserve = self.capacity
        if reserve is not None:
            self.reserve = max(check_length(reserve, "reserve"), self.capacity)
        self._watchers: weakref.WeakSet[LengthWatcher] | None = None
        self._lazy = lazy
        alignment = max(check_alignment(alignment), page_size)
        max_access = Access(max_access)
        self.pages = _check_pages(pages, max_access)
        allocation = allocate(
            Request(
                self.capacity,
                self.pages,
                max_access,
                alignment,
                lazy=lazy,
                name=name,
                contents=Contents(contents),
                recycle=recycle,
                reserve=0 if reserve is None else self.reserve,
            )
        )
        self._allocation = allocation
        self._window = allocation.window(self.capacity)
        note_home(self._window, self, 0)
        if wired:
            try:
                self.prepare()
            except BaseException:
                self.close()
                raise

    @property
    def length(self) -> int:
        """Bytes described, at most `capacity`."""
        return self._length

    @property
    def max_access(self) -> Access:
        """What others get at most."""
        return self.memory.max_access

    @property
    def memory(self) -> OwnedObject:
        """The memory object, with its seals, its lifecycle and its file descriptor."""
        self._check_open()
        assert self._allocation is not None
        return self._allocation.object

    @property
    def address(self) -> int:
        """Of the owner's view, in this task."""
        self._check_open()
        return self._window.address

    @property
    def page_kind(self) -> PageKind:
        """What it is made of now, as the kernel shows it: BASE, TRANSPARENT_HUGE or HUGE.

        TRANSPARENT_HUGE where every whole huge page of the capacity is one; of a mixture, which
        is BASE, `huge_bytes` tells more. Linux: /proc/self/smaps, some ms in a large task; what
        can not change is not asked for again.
        """
        return self._made_of().kind

    @property
    def huge_bytes(self) -> int:
        """How many bytes of the allocated memory lie in huge pages now; as `page_kind`."""
        return self._made_of().huge_bytes

    def _made_of(self) -> MadeOf:
        if self._fixed is not None:
            self._check_open()
            return self._fixed
        made_of = look(self.address, round_page(self.capacity, self.memory.page_size))
        if made_of.fixed:
            self._fixed = made_of
        return made_of

    def set_length(self, length: int) -> None:
        """Describe only the first `length` bytes; memory, mappings and views stay as they are.

        I/O Kit: setLength, which ignores a length past the capacity; here it is `RangeError`.
        """
        length = check_integer(length, "length")
        if not 0 <= length <= self.capacity:
            raise RangeError(
                f"length {length:,} is outside 0 to the capacity {self.capacity:,} of "
                f"{self.name!r}: make a larger buffer, or grow() it first",
                errno=errno.EINVAL,
            )
        with self._lock:
            self._check_open()
            assert self._allocation is not None
            self._window = self._allocation.window(length)
            self._length = length
            for watcher in self._watchers or ():
                watcher.length_changed()

    def grow(self, capacity: int) -> None:
        """Have more capacity, in place: addresses, views and mappings stay as they are.

        The length follows where it was the capacity; one that was set stays. What was prepared is
        prepared all over.

        Parameters
        ----------
        capacity : int
            Bytes, from the present capacity up to `reserve`.

        Raises
        ------
        RangeError
            Past the reserve, or less than there is (EINVAL).
        AllocationError, WiringError
            The capacity is what it was. Pages that came already go back; after a read-only grant
            the seals keep them until the next growth.

        Notes
        -----
        Clients of a `Service` are told (`Connection.wait_length`). I/O Kit: none;
        IOBufferMemoryDescriptor has its capacity for ever.

        Linux: fallocate and MADV_POPULATE_WRITE inside a file that is as large as the reserve and
        sealed against growing. Of HUGE pages the pool has promised all of the reserve from the
        start.
        """
        capacity = check_integer(capacity, "capacity")
        with self._lock:
            self._check_open()
            old = self.capacity
            if not old <= capacity <= self.reserve:
                less = "it never shrinks; set_length() describes less"
                raise RangeError(
                    f"buffer {self.name!r} of {old:,} bytes can grow up to its reserve of "
                    f"{self.reserve:,}, not to {capacity:,}: "
                    f"{less if capacity < old else f'make it with reserve={capacity}'}",
                    errno=errno.EINVAL,
                )
            self._attach()
            self._take_pages(old, capacity)
            self.capacity = max(capacity, self.capacity)  # a signal handler may have grown it more
            self._fixed = None
            if self._length == old:
                self.set_length(self.capacity)

    def _take_pages(self, old: int, new: int) -> None:
        """Fault in what lies between two capacities, and wire it if the rest is; all or nothing."""
        assert self._allocation is not None
        if not self._lazy:
            self._allocation.grow(old, new, self.name)
        object_ = self._allocation.object
        start, end = (round_page(size, object_.page_size) for size in (old, new))
        if not self._prepared or object_.pages is PageKind.HUGE or start == end:
            return
        memory = self._window.memory
        try:
            more = wire(self._allocation.address + start, end - start, keep=memory).release
        except BaseException:
            object_.give_back(start, end - start)
            raise
        self._undo_wiring = _both(self._undo_wiring, more)

    def watch_length(self, watcher: LengthWatcher) -> None:
        """Have `watcher.length_changed()` called at each change, as long as the watcher lives.

        In the thread that makes the change, which holds the buffer's lock: it must not wait.
        """
        with self._lock:
            if self._watchers is None:
                self._watchers = weakref.WeakSet()
            self._watchers.add(watcher)

    def append_bytes(self, data: Buffer) -> None:
        """Add bytes after the current length, and lengthen.

        I/O Kit: appendBytes, which truncates and says success; here nothing is written and
        `RangeError` raised where it does not fit.
        """
        source = bytes_of(data)
        with self._lock:
            self._check_open()
            start = self._length
            if source.nbytes > self.capacity - start:
                raise RangeError(
                    f"{source.nbytes:,} bytes do not fit after the first {start:,} of the "
                    f"{self.capacity:,} of {self.name!r}: grow() it first, or make a larger one",
                    errno=errno.EINVAL,
                )
            self._check_writable("written")
            self.set_length(start + source.nbytes)
            if source.nbytes:
                self._store(start, source)

    def statistics(self) -> BufferStatistics:
        """Tell what it has now, and what became of it; raises `ClosedError`."""
        told = super().statistics()
        lifecycle = self.memory.lifecycle
        return BufferStatistics(
            name=told.name,
            nbytes=told.nbytes,
            mappings=told.mappings,
            mapped_bytes=told.mapped_bytes,
            remote_mappings=told.remote_mappings,
            prepares=told.prepares,
            capacity=self.capacity,
            reserve=self.reserve,
            views=self._window.exports,
            state=lifecycle.state,
            grantees=len(lifecycle.grantees),
            moves=self.moves,
            moved_bytes=self.moved_bytes,
        )

    def _export(self) -> _core.Window:
        self._check_open()
        return self._window

    def _extents(self, offset: int, length: int, access: Access) -> list[Extent]:
        return [Extent(self.memory, offset, length)]

    def _wire(self, direction: Direction) -> Callable[[], None]:
        if self.memory.pages is PageKind.HUGE:
            return _nothing  # huge pages never leave memory, and mlock does not count them
        # Locking would copy all pages of a private view; and each grant would undo it.
        self._attach()
        return wire(self._window.address, self.capacity, keep=self._window.memory).release

    def _freeze(self, offset: int, length: int) -> Frozen:
        from memdesc.descriptors.freezing import freeze_buffer

        with self._lock:
            if offset or length != self._length:
                return super()._freeze(offset, length)
            self._check_open()
            assert self._allocation is not None
            self._fixed = None
            return freeze_buffer(
                self._allocation,
                length,
                self._reader(),
                _attaching(weakref.ref(self)),
                prepared=self.prepare_count > 0,
            )

    def _attach(self) -> None:
        """Move to memory of its own, if it is the source of a snapshot that shares its memory."""
        allocation = self._allocation
        if allocation is None:
            return
        with allocation.object.lock:
            if allocation.object.lifecycle.state is State.DETACHED:
                from memdesc.descriptors import copy_on_write

                self.moved_bytes += copy_on_write.attach(allocation, self.capacity)
                self.moves += 1
                self._fixed = None

    def _close(self) -> None:
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            del self._window
            allocation.close()


def _attaching(this: weakref.ref[BufferMemoryDescriptor]) -> Callable[[], None]:
    """What moves a buffer, kept by its memory: it must not keep the buffer alive."""

    def attach() -> None:
        buffer = this()
        if buffer is not None:
            buffer._attach()

    return attach


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        first()
        second()

    return undo


def _check_pages(pages: PageKind, max_access: Access) -> PageKind:
    pages = PageKind(pages)
    if pages is PageKind.HUGE and max_access.writable:
        raise InvalidArgument(
            "huge pages with max_access=READ_WRITE: a task that may write huge memory can "
            "punch a page out and kill this one with SIGBUS; use other pages, or READ_ONLY",
            errno=errno.EINVAL,
        )
    there = transparent_page_size() if pages is PageKind.TRANSPARENT_HUGE else pages.page_size
    if not there:
        raise PageKindError(
            f"this kernel has no {pages.value} pages: say pages=AUTO", errno=errno.EINVAL
        )
    return pages
