"""Allocating: a memory object, and the writable view that makes this task its owner.

The view is made before any grant, since the seals forbid a writable one afterwards. It lies at the
same addresses for as long as any view of the bytes is alive, whatever becomes of the object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from memdesc import _core
from memdesc.errors import AllocationError, MemdescError, describe_errno
from memdesc.memory.kept import Contents, Kind, Want
from memdesc.memory.limits import check_available
from memdesc.memory.memfd import OwnedObject
from memdesc.memory.page_kinds import (
    PageKind,
    has_free_huge_pages,
    huge_page_size,
    transparent_page_size,
)
from memdesc.memory.placing import map_aligned
from memdesc.memory.populate import populate, populate_huge
from memdesc.memory.recycler import offer, take, trim
from memdesc.memory.transparent import leave_to_faults, populate_auto, populate_transparent
from memdesc.vm import tracing
from memdesc.vm.pages import MAX_LENGTH, Access, page_size, round_page

_WASTE = 8
"""AUTO takes reserved huge pages where rounding up to them wastes at most an eighth."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be allocated. Checked by who asks; see `BufferMemoryDescriptor`."""

    capacity: int
    pages: PageKind
    max_access: Access
    alignment: int = page_size
    lazy: bool = False
    name: str = "memdesc"
    contents: Contents = Contents.ZEROED
    recycle: bool = True
    reserve: int = 0


class Allocation:
    """Memory of our own: the object, and its owner's view of all of it.

    Attributes
    ----------
    object : OwnedObject
    memory : MappedMemory
        The addresses. May be longer than the view, for its alignment.
    start : int
        Of the view's first byte in `memory`.
    kind : Kind, optional
        What it may be recycled as, once it is closed and its last view gone.
    """

    __slots__ = ("_given", "_held", "kind", "memory", "object", "start")

    def __init__(
        self,
        object: OwnedObject,
        memory: _core.MappedMemory,
        start: int,
        kind: Kind | None = None,
    ) -> None:
        self.object = object
        self.memory = memory
        self.start = start
        self.kind = kind
        self._given = False
        object.hold()

    @property
    def address(self) -> int:
        """Of the view's first byte."""
        return self.memory.address + self.start

    def window(self, nbytes: int) -> _core.Window:
        """Give the first `nbytes` to Python, writable."""
        return _core.Window(self.memory, self.start, nbytes, True)

    def give_object(self) -> OwnedObject:
        """Give the object to the caller, who closes it. The view goes with its last window."""
        self._given = True
        self.object.let_go()
        return self.object

    def grow(self, old: int, new: int, name: str) -> None:
        """Fault in the pages between two capacities, in the way of the object's page kind.

        Raises
        ------
        AllocationError
            What came was given back, unless the seals keep it: then it waits for the next growth.
        """
        start = round_page(old, self.object.page_size)
        length = round_page(new, self.object.page_size) - start
        if not length:
            return
        doing = f"growing buffer {name!r} by {length:,} bytes"
        if self.object.pages is not PageKind.HUGE:  # those were promised to the mapping
            check_available(length, doing)
        try:
            _populate(self.object, start, self.address + start, length, doing)
        except MemdescError:
            self.object.give_back(start, length)
            raise
        except OSError as error:
            self.object.give_back(start, length)
            raise AllocationError(
                f"{doing}: {describe_errno(error)}", errno=error.errno, requested=length
            ) from error
        except BaseException:
            self.object.give_back(start, length)
            raise

    def close(self) -> None:
        """Let go of the object, to the recycler or for good. The view goes with its last window."""
        kind, self.kind = self.kind, None
        if self._given:
            return
        if kind is None or not offer(kind, self.object, self.memory, self.start):
            self.object.close()
        self.object.let_go()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.close()


def allocate(request: Request) -> Allocation:
    """Make a memory object, mapped for its owner, its pages faulted in unless it is lazy.

    Of memory that is kept warm, where some fits. Where there is too little for a fresh one, what
    is kept is given back first.

    Raises
    ------
    AllocationError
        With `requested` and `available`; nothing stays allocated.
    """
    kind = None
    if request.recycle and not request.lazy and not request.reserve:
        kind = Kind(request.pages, request.max_access, request.name)
        kept = take(Want(kind, request.capacity, request.alignment, request.contents))
        if kept is not None:
            return Allocation(*kept, kind)
    try:
        allocation = _allocate_or_trim(request)
    except AllocationError as error:
        tracing.blamed(error, of=("BufferMemoryDescriptor", "MappedMemory"))
        raise
    allocation.kind = kind
    return allocation


def _allocate_or_trim(request: Request) -> Allocation:
    try:
        return _allocate_fresh(request)
    except AllocationError:
        if not trim():
            raise
        return _allocate_fresh(request)


def _allocate_fresh(request: Request) -> Allocation:
    if _suits_huge_pages(request):
        try:
            return _allocate(replace(request, pages=PageKind.HUGE))
        except AllocationError:
            pass  # the pool has not that many: what is next is told by the kernel again
    return _allocate(request)


def _suits_huge_pages(request: Request) -> bool:
    """Whether AUTO is to try the pool: little is wasted, and such memory may be shared."""
    if (
        request.pages is not PageKind.AUTO
        or request.lazy
        or request.reserve
        or request.max_access.writable
    ):
        return False
    try:
        size = huge_page_size()
        return (
            0 < size <= request.capacity <= MAX_LENGTH - size
            and -request.capacity % size <= request.capacity // _WASTE
            and has_free_huge_pages()
        )
    except OSError:  # no descriptor is left to look with: making the memory says so
        return False


def _allocate(request: Request) -> Allocation:
    size = round_page(max(request.capacity, request.reserve), request.pages.page_size)
    populated = round_page(request.capacity, request.pages.page_size)
    doing = f"allocating buffer {request.name!r} of {populated:,} bytes"
    object_ = OwnedObject(request.name, size, pages=request.pages, max_access=request.max_access)
    try:
        if request.pages is PageKind.HUGE:  # a mapping is promised all of them at once
            check_available(size, doing, request.pages)
        elif not request.lazy:
            check_available(populated, doing)
        memory, start = _map_owner(object_, _alignment(request, size))
        if not request.lazy:
            _populate(object_, 0, memory.address + start, populated, doing)
        elif request.pages in (PageKind.AUTO, PageKind.TRANSPARENT_HUGE):
            leave_to_faults(memory.address + start, size, doing, request.pages)
    except MemdescError:
        object_.close()
        raise
    except OSError as error:
        object_.close()
        raise AllocationError(
            f"{doing}, mapped for its owner at {size:,} bytes of addresses: "
            f"{describe_errno(error)}; ask for less (of `reserve` too), or say lazy=True if there "
            "are too few pages",
            errno=error.errno,
            requested=size,
        ) from error
    except BaseException:
        object_.close()
        raise
    return Allocation(object_, memory, start)


def _alignment(request: Request, size: int) -> int:
    """Of the owner's view: huge pages can only be mapped whole, at multiples of their size."""
    huge = transparent_page_size()
    if huge and size >= huge and request.pages in (PageKind.AUTO, PageKind.TRANSPARENT_HUGE):
        return max(request.alignment, huge)
    return request.alignment


def _map_owner(object_: OwnedObject, alignment: int) -> tuple[_core.MappedMemory, int]:
    """Map all of an object at an aligned address: (the addresses, where it begins in them)."""
    fd = object_.own_fd()
    prot = _core.PROT_READ | _core.PROT_WRITE
    if alignment <= object_.page_size:
        return _core.map_memory(0, object_.size, prot, _core.MAP_SHARED, fd, 0), 0
    return map_aligned(object_.size, prot, fd, 0, alignment)


def _populate(object_: OwnedObject, offset: int, address: int, length: int, doing: str) -> None:
    """Fault in the pages of a range in the way of the object's page kind."""
    if object_.pages is PageKind.HUGE:
        populate_huge(address, length)
    elif object_.pages is PageKind.TRANSPARENT_HUGE:
        populate_transparent(object_, offset, address, length, doing)
    elif object_.pages is PageKind.AUTO:
        populate_auto(object_, offset, address, length, doing)
    else:
        populate(object_, offset, address, length, doing)
