"""Zone: elements of one size, in constant time, from a limited pool of private memory.

`alloc` and `free` are compiled (`_core.ElementList`); here is what is not done at once: waiting,
refusing, telling.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, Self, final

from memdesc import _core
from memdesc.alloc.chunks import ChunkList, collect_zones, living_zones
from memdesc.alloc.layout import DEFAULT_ALIGNMENT, check_name, plan
from memdesc.alloc.statistics import ZoneStatistics, ZoneTable
from memdesc.copyio import bytes_of
from memdesc.errors import (
    AllocationError,
    ClosedError,
    DoubleFreeError,
    Holding,
    InvalidArgument,
    RangeError,
    UseAfterFreeError,
    ZoneExhausted,
)
from memdesc.memory import zone_map
from memdesc.vm import tracing
from memdesc.vm.timeouts import check_timeout

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

_ASK_AGAIN = 0.05
"""Seconds after which a waiting allocation tries to grow again: nobody tells of free memory."""
_ROWS = 10
"""Rows of the table that an exception's text shows; `holders` has them all."""

_PASSED_OVER = {"contextlib", "memdesc.alloc.zone", "memdesc.alloc.iomalloc"}
"""Modules that allocate for others: not the place that a tracking zone notes."""


@final
class Zone(ChunkList):
    r"""Hands out elements of one size, from a limited pool of private memory (XNU: zone_t).

    It is not for memory that is shared: no other task can map an element (`ZONE_MEMORY`). Its
    memory comes from the zone map, which all zones of the process share, a chunk at a time.

    Parameters
    ----------
    name : str
        For messages and tables; 1 to 63 printable characters. Several zones may have one name.
    element_size : int
        Bytes, 1 to 1 MiB.
    capacity : int
        Bytes, at least one element: at most `capacity // stride` elements are given out, the
        stride being the element size rounded up to the alignment.
    alignment : int
        Of each element's address: a power of two, 1 to a page. An element with an alignment of at
        least its size does not cross a page.
    wired : bool
        Take all of the memory now, and keep it resident. Never collected.
    track : bool
        Note where each element is allocated (file, line, function), for `holders` and the text of
        `ZoneExhausted`. Makes `alloc` about thirty times slower. `memdesc.debug` has it in all.

    Raises
    ------
    InvalidArgument
        Each with its numbers.
    WiringError
        `wired`: with its `reason`; nothing stays wired.
    ZoneExhausted
        `wired`: the zone map or the machine has not so much memory; nothing stays taken.

    Notes
    -----
    Linux: mprotect, madvise, within one reservation of addresses; mlock if wired. No privilege.
    XNU: zone_create, zinit; there a bad argument, a double free or an exhausted zone panics.

    Threads: safe. Fork: in the child, `alloc` and `free` raise `ClosedError`; elements can be
    read and written there, copy-on-write, and new zones be made. The zone lives until it is
    dropped; its memory until the last element is.

    Examples
    --------
    >>> zone = Zone("headers", element_size=256, capacity=1 << 20)
    >>> header = zone.alloc()
    >>> memoryview(header)[:5] = b"hello"
    >>> bytes(header)[:6]
    b'hello\x00'
    >>> zone.free(header)
    """

    def __init__(
        self,
        name: str,
        element_size: int,
        capacity: int,
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        wired: bool = False,
        track: bool = False,
    ) -> None:
        layout = plan(check_name(name), element_size, capacity, alignment)
        if layout.max_size > zone_map.size():
            raise InvalidArgument(
                f"capacity of zone {name!r} is {capacity:,} bytes, all zones together have "
                f"{zone_map.size():,}: ask for less, or set a larger zone map before the first "
                "zone is made (zone_map.configure)",
                errno=errno.EINVAL,
            )
        super().__init__(name, layout, bool(wired), bool(track) or tracing.books is not None)
        if wired:
            self._take_all()

    # -- what is asked most ----------------------------------------------------------------------

    @property
    def element_size(self) -> int:
        """Bytes of an element."""
        return self._layout.element_size

    @property
    def max_elements(self) -> int:
        """Elements that can be in use at one time."""
        return self._layout.max_elements

    @property
    def closed(self) -> bool:
        """Whether it gives no more elements."""
        return self._closed

    @contextmanager
    def element(self, timeout: float | None = 0) -> Iterator[_core.ZoneElement]:
        """Allocate an element for the length of a ``with`` block.

        Leaving the block never raises: where views of the element are alive, it goes back with
        the last of them, and gives no new ones. Parameters and errors as of `alloc`.
        """
        element = self.alloc(timeout)
        try:
            yield element
        finally:
            self._let_go(element)

    def require(self, buffer: Buffer) -> None:
        """Raise unless a buffer lies wholly inside one living element of this zone.

        Parameters
        ----------
        buffer : buffer
            An element, a view of one, or any other contiguous buffer.

        Raises
        ------
        InvalidArgument
            It lies elsewhere, or where no living element is.
        RangeError
            It begins in an element and reaches past its end.

        Notes
        -----
        XNU: zone_require, which panics. Takes time in the number of chunks.
        """
        if isinstance(buffer, _core.ZoneElement) and not buffer.living:
            raise InvalidArgument(
                f"{self!r}: element number {buffer.number} was freed", errno=errno.EINVAL
            )
        address, nbytes, _ = _core.buffer_address(bytes_of(buffer))
        found = self._find(address)
        if found is None:
            raise InvalidArgument(
                f"{nbytes:,} bytes at {address:#x} are not of {self!r}: allocate them there",
                errno=errno.EINVAL,
            )
        start, number = found
        if number <= 0:
            state = "free" if number == 0 else "quarantined"
            raise InvalidArgument(
                f"{nbytes:,} bytes at {address:#x} lie in an element of {self!r} that is {state}: "
                "a pointer to it was kept after free()",
                errno=errno.EINVAL,
            )
        if address + nbytes > start + self.element_size:
            raise RangeError(
                f"{nbytes:,} bytes at offset {address - start:,} of element number {number} of "
                f"{self!r} reach past its end: it has {self.element_size:,}"
            )

    # -- what the compiled half can not do -------------------------------------------------------

    def _alloc(self, timeout: float | None) -> _core.ZoneElement:
        """Go on where no element was free at once, or where each one has to be asked for."""
        until = _deadline(timeout)
        element, shortage = self._obtain()
        try:
            if element is None and until > 0:
                with self._lock:
                    self._waits += 1
                element, shortage = self._wait(until)
            if element is None:
                with self._lock:
                    self._failures += 1
                raise self._exhausted(timeout, shortage) from shortage
        finally:
            del shortage  # its traceback leads to this frame and the caller's: no cycle of them
        if self._sites is not None:
            self._sites[element.number] = _call_site()
        return element

    def _obtain(self) -> tuple[_core.ZoneElement | None, AllocationError | None]:
        """Take an element, growing if need be; else None, and what growing failed of, if it did."""
        collected = False
        while True:
            self._check_usable()
            element = self._take()
            if element is not None:
                return element, None
            try:
                if not self._grow():
                    return None, None
            except AllocationError as error:
                # Not kept in a variable: its traceback holds this frame, and so the element.
                if collected or not collect_zones():
                    return None, error
                collected = True
            else:
                zone_map.warn_if_due()

    def _wait(self, until: float) -> tuple[_core.ZoneElement | None, AllocationError | None]:
        """Take the element that comes free next.

        Whoever frees takes one lock off the deque and releases it. So a waiter is on the deque
        before it looks for an element: what comes free after that look wakes somebody. A waiter
        that was woken and leaves passes that on, if there is still one free.
        """
        waiter = threading.Lock()
        waiter.acquire()
        woken = True
        try:
            while True:
                if woken:
                    self._waiters.append(waiter)
                element, shortage = self._obtain()
                left = until - time.monotonic()
                if element is not None or left <= 0:
                    return element, shortage
                longest = threading.TIMEOUT_MAX if shortage is None else _ASK_AGAIN
                woken = waiter.acquire(timeout=min(left, longest))
        finally:
            shortage = None  # what is returned was taken before this
            try:
                self._waiters.remove(waiter)
            except ValueError:
                if self._slots()[0]:
                    self._wake()

    def _wake(self) -> None:
        try:
            self._waiters.popleft().release()
        except IndexError:  # nobody waits
            return

    def _free(self, element: object) -> None:
        """Say why an element can not be freed."""
        if not isinstance(element, _core.ZoneElement):
            raise InvalidArgument(
                f"{self!r} can not free an object of type {type(element).__name__}: give what "
                "alloc() gave, not a view of it",
                errno=errno.EINVAL,
            )
        if element.zone is not self:
            raise InvalidArgument(
                f"{self!r} can not free element number {element.number} of {element.zone!r}: free "
                "it there",
                errno=errno.EINVAL,
            )
        self._check_own()
        if not element.living:
            raise DoubleFreeError(
                f"element number {element.number} of {self!r} was freed before",
                errno=errno.EINVAL,
            )
        if element.exports:
            raise tracing.blamed(
                BufferError(
                    f"element number {element.number} of {self!r} has {element.exports} live "
                    "view(s): release them (memoryview.release, del of arrays) before it is freed"
                ),
                views_of=element,
            )
        self.free(element)  # the views went meanwhile, in another thread

    def _take_all(self) -> None:
        try:
            while self._extend():
                zone_map.warn_if_due()
        except AllocationError as error:
            self.close()
            raise self._exhausted(0, error) from error
        except BaseException:
            self.close()
            raise

    def _changed(self, address: int, offset: int, value: int) -> NoReturn:
        """Tell of an element that was no longer zero when it was to be given out."""
        past = offset - self.element_size
        where = f"offset {offset}" if past < 0 else f"{past} bytes past the end"
        raise UseAfterFreeError(
            f"memory of {self!r} was written to while it was free: the byte at {where} of the "
            f"element at {address:#x} is {value:#04x}; somebody kept a pointer after free(), or "
            "wrote past a neighbour's end. It is never given out again; the zone goes on",
            errno=errno.EUCLEAN,
            address=address,
            offset=offset,
            value=value,
        )

    # -- lifetime --------------------------------------------------------------------------------

    def close(self) -> None:
        """Give no more elements; waiting allocations raise `ClosedError`. Again is a no-op.

        Elements that are alive stay valid and may still be freed, or dropped. Empty chunks go
        back to the kernel now, the others when the zone and its elements are gone. In a fork
        child of its process it does nothing.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._ask()
            self._collect()
        for _ in range(len(self._waiters)):
            self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- telling ---------------------------------------------------------------------------------

    def statistics(self) -> ZoneStatistics:
        """Tell what the zone has, holds and did."""
        with self._lock:
            allocs, frees, drops, quarantined, living, peak = self._counts()
            layout = self._layout
            return ZoneStatistics(
                name=self.name,
                element_size=layout.element_size,
                stride=layout.stride,
                current_size=self._held(),
                peak_size=self._peak_size,
                max_size=layout.max_size,
                current_elements=self._slots()[0] + living + quarantined,
                max_elements=layout.max_elements,
                in_use=living,
                peak_in_use=peak,
                allocation_size=layout.chunk_length,
                allocs=allocs,
                frees=frees,
                drops=drops,
                failures=self._failures,
                waits=self._waits,
                waiting=len(self._waiters),
                quarantined=quarantined,
                collected=self._collected,
                wired=self.wired,
                tracked=self._sites is not None,
                closed=self._closed,
            )

    def holders(self) -> tuple[Holding, ...]:
        """Tell who holds the elements in use: a row for each place that allocated some.

        Without `track=True` the places are not known, and all are one row. The largest comes
        first. Where nothing is held there is no row.
        """
        size = self.element_size
        if self._sites is None:
            living = self._counts()[4]
            oldest, newest = self._span()
            what = "not tracked: make the zone with track=True to see where they are allocated"
            return (Holding(what, living, living * size, oldest, newest),) if living else ()
        groups: dict[str, list[int]] = {}
        for number in self._living():
            groups.setdefault(self._sites.get(number, "just being allocated"), []).append(number)
        rows = [
            Holding(site, len(numbers), len(numbers) * size, min(numbers), max(numbers))
            for site, numbers in groups.items()
        ]
        return tuple(sorted(rows, key=lambda row: -row.elements))

    def __repr__(self) -> str:
        living, most = self._counts()[4], self._layout.max_elements
        state = ", closed" if self._closed else ""
        return f"<Zone {self.name!r}: {living:,} of {most:,} x {self.element_size:,} bytes{state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Zone is memory of this task: it can not be copied or pickled")

    def _exhausted(self, timeout: float | None, shortage: AllocationError | None) -> ZoneExhausted:
        waited = f" and none came free in {timeout:g} s" if timeout else ""
        layout = self._layout
        if shortage is None:
            _, _, _, quarantined, living, _ = self._counts()
            bad = f", {quarantined:,} quarantined" if quarantined else ""
            text = (
                f"zone {self.name!r} is exhausted{waited}: {living:,} of {layout.max_elements:,} "
                f"elements of {layout.element_size:,} bytes are in use{bad}; free some, wait for "
                "one (timeout=), or make the zone with a larger capacity"
            )
            holders = self.holders()
        else:
            text = f"zone {self.name!r} can not grow{waited}: {shortage}"
            holders = _holders_of_the_map()
        rows = [
            f"\n  {row.elements:>9,} elements, {row.nbytes:>13,} bytes: {row.holder}"
            for row in holders[:_ROWS]
        ]
        return ZoneExhausted(
            text + "".join(rows),
            errno=_number(timeout, shortage),
            requested=layout.element_size,
            available=0 if shortage is None else shortage.available,
            zone=self.name,
            holders=holders,
        )

    def _check_usable(self) -> None:
        self._check_own()
        if self._closed:
            raise ClosedError(f"zone {self.name!r} is closed: it gives no more elements")


def _deadline(timeout: float | None) -> float:
    """When to stop waiting, by the monotonic clock; 0 for not waiting at all."""
    if timeout is None:
        return math.inf
    check_timeout(timeout)
    return time.monotonic() + timeout if timeout else 0.0


def _number(timeout: float | None, shortage: AllocationError | None) -> int:
    if timeout:
        return errno.ETIMEDOUT
    return errno.ENOMEM if shortage is None or shortage.errno is None else shortage.errno


def _call_site() -> str:
    """Where, outside of this package, the allocation was asked for."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _PASSED_OVER:
        frame = frame.f_back
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"


def _holders_of_the_map() -> tuple[Holding, ...]:
    told = [zone.statistics() for zone in living_zones() if isinstance(zone, Zone)]
    rows = [
        Holding(f"zone {row.name!r}", row.in_use, row.current_size, 0, 0)
        for row in told
        if row.current_size
    ]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def zprint() -> ZoneTable:
    """Tell what all zones of this process hold; printed, it is a table like that of zprint.

    Examples
    --------
    >>> zone = Zone("headers", element_size=256, capacity=1 << 20)
    >>> header = zone.alloc()
    >>> [(row.name, row.in_use) for row in zprint().zones if row.name == "headers"]
    [('headers', 1)]
    """
    told = [zone.statistics() for zone in living_zones() if isinstance(zone, Zone)]
    return ZoneTable(tuple(sorted(told, key=lambda row: row.name)), zone_map.statistics())
