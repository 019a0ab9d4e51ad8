"""Memory by its size, as I/O Kit's IOMalloc family gives it: small from zones, large in pages.

| call | small: a zone element | large: a `PageBlock` | mappable elsewhere |
|---|---|---|---|
| `io_malloc` | up to 8 KiB | private pages, there at once | never |
| `io_malloc_pageable` | never | private pages, at the first touch | never |
| `io_malloc_aligned` | below a page | pages of a buffer of its own | from a page on |
| `io_malloc_contiguous` | never | one page, or huge pages | always |

"Do not use IOMalloc to acquire memory you ultimately intend to share": whoever tries is told
ZONE_MEMORY or PRIVATE_MEMORY. The seeds' less preferable way is `io_malloc_aligned` or
`io_malloc_contiguous`; the preferred one is `BufferMemoryDescriptor`.

All give writable buffers of zero bytes, `io_free` takes them all back. One that is only dropped
goes back by itself.
"""

from __future__ import annotations

import errno
import os
import weakref
from functools import partial
from typing import Final, final

from memdesc import _core
from memdesc.alloc.zone import Zone
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    AllocationError,
    ClosedError,
    DoubleFreeError,
    InvalidArgument,
    NotPrivilegedError,
    UnsupportedError,
    describe_errno,
)
from memdesc.memory import zone_map
from memdesc.memory.limits import check_available
from memdesc.memory.page_kinds import PageKind, huge_page_size
from memdesc.memory.populate import populate
from memdesc.vm import tracing
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import check_alignment, check_length, page_size, round_page
from memdesc.vm.physical import frames
from memdesc.vm.task import Task

__all__ = [
    "PageBlock",
    "io_free",
    "io_malloc",
    "io_malloc_aligned",
    "io_malloc_contiguous",
    "io_malloc_pageable",
]

_POWERS = [1 << bits for bits in range(5, 14)]
SIZE_CLASSES: Final = (16, *sorted([*_POWERS, *(power // 4 * 3 for power in _POWERS[1:])]))
"""Element sizes of the zones: two for each power of two, as XNU's kalloc has them, to 8 KiB."""


@final
class PageBlock(_core.Exporter):
    """Memory in pages of its own, from one of the calls here: a writable buffer.

    Attributes
    ----------
    address : int
        In this task.
    nbytes : int
        As asked for; the rest of the last page is zero and in no view.
    descriptor : BufferMemoryDescriptor or None
        Describes it, so that it can be mapped and shared; None for private pages. Ends with the
        block.
    """

    def __init__(
        self,
        window: _core.Window,
        descriptor: BufferMemoryDescriptor | None = None,
        *,
        contiguous: bool = False,
    ) -> None:
        self.address = window.address
        self.nbytes = window.nbytes
        self.descriptor = descriptor
        self._contiguous = contiguous
        self._window: _core.Window | None = window
        self._owner = os.getpid()
        self._lock = lock_for(self)

    def __len__(self) -> int:
        return self.nbytes

    def __repr__(self) -> str:
        state = "" if self._window is not None else ", freed"
        return f"<PageBlock {self.nbytes:,} bytes at {self.address:#x}{state}>"

    def _export(self) -> _core.Window:
        if self._window is None:
            raise ClosedError(f"{self!r}: allocate a new one")
        return self._window

    @property
    def physical_address(self) -> int:
        """Of the first byte; the others follow it. Read from the kernel at each call.

        It holds while the pages do not move. Pages of the huge-page pool do not in ordinary
        running; other pages may, wired or not, unless a device or io_uring pins them.

        Linux: /proc/self/pagemap; needs CAP_SYS_ADMIN. I/O Kit: IOMallocContiguous's third
        argument.

        Raises
        ------
        NotPrivilegedError
            The kernel does not show page frames to this process (EPERM).
        UnsupportedError
            Not from `io_malloc_contiguous` (EINVAL), or the kernel has moved pages since (EAGAIN).
        """
        self._export()
        if not self._contiguous:
            raise UnsupportedError(
                f"{self!r} is not physically contiguous: allocate it by io_malloc_contiguous",
                errno=errno.EINVAL,
            )
        first = _contiguous_frame(self.address, self.nbytes)
        if first is None:
            raise UnsupportedError(
                f"the kernel has moved pages of {self!r}, they do not follow one another any more: "
                "allocate another one (huge pages of the pool, vm.nr_hugepages, stay)",
                errno=errno.EAGAIN,
            )
        return first * page_size + self.address % page_size

    def _free(self) -> None:
        with self._lock:
            if self._window is None:
                raise DoubleFreeError(f"{self!r} was freed before", errno=errno.EINVAL)
            if os.getpid() != self._owner:
                raise ClosedError(
                    f"{self!r} belongs to process {self._owner}, which this one was forked from: "
                    "free it there; here it goes with the process",
                    errno=errno.EINVAL,
                )
            if self._window.exports:
                raise tracing.blamed(
                    BufferError(
                        f"{self!r} has {self._window.exports} live view(s), arrays or memoryviews: "
                        "delete them first"
                    ),
                    views_of=self._window,
                )
            self._window = None
        if self.descriptor is not None:
            self.descriptor.close()


class _Zones:
    """The zones of one process, one for each size class, made when first needed."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._zones: dict[int, Zone] = {}
        self._all: weakref.WeakSet[Zone] = weakref.WeakSet()  # also those of the parent
        self._lock = lock_for(self)

    def of(self, size: int) -> Zone:
        """Give the zone of a size class."""
        zone = self._zones.get(size)
        if zone is not None and self._owner == os.getpid():
            return zone
        with self._lock:
            if self._owner != os.getpid():  # the parent's zones give nothing to a fork child
                self._owner, self._zones = os.getpid(), {}
            zone = self._zones.get(size)
            if zone is None:
                zone = Zone(
                    f"io_malloc.{size}",
                    size,
                    zone_map.size() // 2,
                    alignment=min(size & -size, page_size),
                )
                self._zones[size] = zone
                self._all.add(zone)
            return zone

    def knows(self, zone: object) -> bool:
        """Whether a zone is one of these."""
        return zone in self._all


_zones = _Zones()


def io_malloc(nbytes: int) -> _core.ZoneElement | PageBlock:
    r"""Allocate private memory that is there at once.

    Parameters
    ----------
    nbytes : int
        At least 1. Up to 8 KiB it is a zone element, whose `len` is its size class; the bytes
        behind `nbytes` are yours too.

    Raises
    ------
    ZoneExhausted, AllocationError
        There is no more (ENOMEM).

    Notes
    -----
    I/O Kit: IOMalloc, which gives NULL. Linux: mmap, MADV_POPULATE_WRITE; no privilege.

    Examples
    --------
    >>> import memdesc as md
    >>> scratch = md.io_malloc(100)
    >>> memoryview(scratch)[:5] = b"hello"
    >>> len(scratch), bytes(scratch)[:6]
    (128, b'hello\x00')
    >>> md.io_free(scratch)
    """
    nbytes = check_length(nbytes, "nbytes")
    if nbytes <= SIZE_CLASSES[-1]:
        return _zones.of(next(size for size in SIZE_CLASSES if size >= nbytes)).alloc()
    return _private_pages(nbytes, page_size, lazy=False)


def io_malloc_pageable(nbytes: int, alignment: int = 1) -> PageBlock:
    """Allocate private pages, each taken at its first touch, that may be paged out.

    Parameters
    ----------
    nbytes : int
        At least 1.
    alignment : int
        Of the address: a power of two.

    Notes
    -----
    I/O Kit: IOMallocPageable. A full machine is found at the touch: by the out-of-memory killer.
    """
    nbytes = check_length(nbytes, "nbytes")
    return _private_pages(nbytes, max(check_alignment(alignment), page_size), lazy=True)


def io_malloc_aligned(nbytes: int, alignment: int) -> _core.ZoneElement | PageBlock:
    """Allocate memory at an aligned address.

    Parameters
    ----------
    nbytes : int
        From a page on it is a buffer of its own, which can be mapped and shared (the seeds ask
        for an integral number of pages: the rest of the last page would be mapped as well, zero).
    alignment : int
        A power of two (I/O Kit rounds others up).

    Notes
    -----
    I/O Kit: IOMallocAligned. What others get of it is read-only.
    """
    nbytes, alignment = check_length(nbytes, "nbytes"), check_alignment(alignment)
    if nbytes < page_size >= alignment:
        for size in SIZE_CLASSES:
            if size >= nbytes and size % alignment == 0:
                return _zones.of(size).alloc()
    return _block(BufferMemoryDescriptor(nbytes, alignment=alignment, name="io_malloc_aligned"))


def io_malloc_contiguous(nbytes: int, alignment: int = 1) -> PageBlock:
    """Allocate memory whose physical pages follow one another.

    Parameters
    ----------
    nbytes : int
        Up to a page it is one wired base page. Up to a huge page it is one of those: from the
        pool, else put together by the kernel and wired. More than that only where pages of the
        pool happen to follow one another, and this process may look.
    alignment : int
        Of the address here and of the physical address: a power of two up to a huge page.

    Raises
    ------
    AllocationError
        No such memory is to be had (ENOMEM).
    WiringError
        It can not be wired: RLIMIT_MEMLOCK, as a rule. Pages of the pool need none.

    Notes
    -----
    I/O Kit: IOMallocContiguous. Contiguity is checked page by page where the kernel shows page
    frames (CAP_SYS_ADMIN), else it is that of a single page. A block takes whole pages of its
    kind: of a small block the rest of a huge page is unused.
    """
    nbytes, alignment = check_length(nbytes, "nbytes"), check_alignment(alignment)
    make = partial(BufferMemoryDescriptor, nbytes, alignment=alignment, name="io_malloc_contiguous")
    if nbytes <= page_size >= alignment:
        return _block(make(pages=PageKind.BASE, wired=True), contiguous=True)
    huge = huge_page_size()
    if alignment > max(huge, page_size):
        raise InvalidArgument(
            f"alignment is {alignment:,}: physical memory is aligned to a huge page, {huge:,} "
            "bytes, at most",
            errno=errno.EINVAL,
        )
    try:
        buffer = make(pages=PageKind.HUGE)
    except AllocationError as error:
        if nbytes > huge:
            raise _no_contiguous(nbytes) from error
        buffer = BufferMemoryDescriptor(
            huge, alignment=alignment, pages=PageKind.TRANSPARENT_HUGE, wired=True,
            name="io_malloc_contiguous",
        )  # fmt: skip
        buffer.set_length(nbytes)
    try:
        consecutive = _contiguous_frame(buffer.address, nbytes) is not None
    except NotPrivilegedError:
        consecutive = nbytes <= huge  # a huge page is
    if not consecutive:
        buffer.close()
        raise _no_contiguous(nbytes)
    return _block(buffer, contiguous=True)


def io_free(block: object) -> None:
    """Give back what one of the calls here allocated.

    Raises
    ------
    BufferError
        Views of it are alive.
    DoubleFreeError
        It was freed before.
    InvalidArgument
        It is not from these calls.
    ClosedError
        It belongs to the process that this one was forked from.

    Notes
    -----
    I/O Kit: IOFree, IOFreeAligned and the others, which must be told the size, and panic.
    """
    if isinstance(block, PageBlock):
        block._free()
        return
    if isinstance(block, _core.ZoneElement):
        zone = block.zone
        if zone is not None and _zones.knows(zone):
            zone.free(block)
            return
    raise InvalidArgument(
        f"{block!r} was not allocated by io_malloc or its kin: give back each thing where it came "
        "from (zone.free, descriptor.close)",
        errno=errno.EINVAL,
    )


def _block(buffer: BufferMemoryDescriptor, *, contiguous: bool = False) -> PageBlock:
    return PageBlock(buffer._export(), buffer, contiguous=contiguous)


def _private_pages(nbytes: int, alignment: int, *, lazy: bool) -> PageBlock:
    size = round_page(nbytes)
    doing = f"allocating {nbytes:,} bytes of private pages"
    prot = _core.PROT_READ | _core.PROT_WRITE
    flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
    if not lazy:
        check_available(size, doing)
    try:
        memory = _core.reserve_memory(size + alignment - page_size)
        start = -memory.address % alignment
        _core.place_memory(memory, start, size, prot, flags, -1, 0)
    except OSError as error:
        raise AllocationError(
            f"{doing}: {describe_errno(error)}; ask for less", errno=error.errno, requested=size
        ) from error
    if not lazy:
        populate(None, 0, memory.address + start, size, doing)
    return PageBlock(_core.Window(memory, start, nbytes, True))


def _contiguous_frame(address: int, nbytes: int) -> int | None:
    """The first frame of a range whose frames are consecutive; None where they are not."""
    with Task.current() as task:
        found = frames(task, address, nbytes)
    first = found[0]
    if first is None or found != list(range(first, first + len(found))):
        return None
    return first


def _no_contiguous(nbytes: int) -> AllocationError:
    return AllocationError(
        f"{nbytes:,} physically contiguous bytes are not to be had: a huge page has "
        f"{huge_page_size():,}, and those of the pool do not follow one another (or may not be "
        "looked at: CAP_SYS_ADMIN); ask for less, reserve huge pages (vm.nr_hugepages), best soon "
        "after boot, or use a buffer with several physical segments",
        errno=errno.ENOMEM,
        requested=nbytes,
    )
