"""The zone map: the memory of this process that all its zones share, of a limited, fixed size.

It is two things. A *budget*: so many bytes all zones together hold at most (`configure`). And one
range of *addresses*, several times as large, since addresses stay with the zone that was given
them, also while their pages are with the kernel: no other zone is given them as long as that
zone or any element of it lives. So a stray pointer into a zone never meets another zone's data.

The memory is private and anonymous: no other task can map it, and it is never shared. In
/proc/PID/maps it is called `[anon:memdesc zones]`, where the kernel can name memory.

A fork child inherits the parent's zones as they were, copy-on-write, and its own new zones
come from a map of its own.

XNU: zone_map. There, at 95 %, a thread kills the process that owns most of the largest zone, and
an allocator that finds it full panics in the end; here it is a callback, and an exception.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from bisect import insort
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from memdesc import _core
from memdesc.errors import AllocationError, InvalidArgument, describe_errno
from memdesc.memory import limits
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import MAX_LENGTH, check_integer, check_length, round_page

__all__ = ["ZoneMapStatistics", "configure", "set_warning", "statistics"]

NAME = "memdesc zones"
DEFAULT_SIZE = 1 << 30
_ROOM = 4
"""Addresses for each byte of the budget."""
_CHECKED = 4 << 20
"""Bytes that are held against the machine's limits at a time: asking takes as long as a chunk."""


@dataclass(frozen=True, slots=True)
class ZoneMapStatistics:
    """The zone map, all in bytes.

    Attributes
    ----------
    size : int
        What all zones together may hold.
    used, peak : int
        What they hold: now, and the most there ever was.
    addresses, addresses_used : int
        Address space reserved, and how much of it belongs to zones.
    """

    size: int
    used: int
    peak: int
    addresses: int
    addresses_used: int


@dataclass(slots=True)
class _Settings:
    """What is set from outside; outlives a fork."""

    size: int = DEFAULT_SIZE
    warning: Callable[[ZoneMapStatistics], object] | None = None
    percent: int = 95


class _Map:
    """The map of one process.

    What dead chunks give back waits in a queue for the next caller: a finalizer must not wait for
    a lock, which its own thread may hold further down. A signal handler that wants memory while
    its own thread is in the middle of a change here is refused.
    """

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self.size = settings.size
        self.memory = _reserve(settings.size * _ROOM)
        self.end = self.memory.address + self.memory.length
        self.charged: dict[int, int] = {}  # length of each chunk that is held, by its address
        self.returned: deque[tuple[int, int]] = deque()  # addresses of chunks that are gone
        self.due: deque[bool] = deque()  # a warning to be given once no lock is held
        self.used = self.peak = 0  # `used` sums up `charged` as it was with `_counted` chunks
        self._counted = 0
        self._checked = 0  # of `used`: as far as the machine's limits were asked
        self._warned = False
        self._free: list[tuple[int, int]] = []  # addresses that were given back: start, end
        self._next = self.memory.address  # from here on none was ever given out
        self._lock = lock_for(self)
        self._busy = False

    def take(self, length: int) -> int:
        """Give addresses that belong to no zone, readable and writable."""
        with self._lock:
            self._check_idle()
            self._busy = True
            try:
                self._settle()
                address = self._find(length)
                try:
                    _core.mprotect(address, length, _core.PROT_READ | _core.PROT_WRITE)
                except OSError as error:
                    self._put_back(address, address + length)
                    raise _unavailable(error, length) from error
                return address
            finally:
                self._busy = False

    def _check_idle(self) -> None:
        if self._busy:
            raise AllocationError(
                "a zone can not grow in a signal handler or finalizer that interrupted its own "
                "thread in the middle of growing one: allocate outside of it",
                errno=errno.EDEADLK,
            )

    def _find(self, length: int) -> int:
        for index, (start, end) in enumerate(self._free):
            if end - start >= length:
                self._free[index : index + 1] = [(start + length, end)] * (end - start > length)
                return start
        if self.end - self._next < length:
            raise AllocationError(
                f"the zone map has no {length:,} consecutive bytes of addresses left (of "
                f"{self.memory.length:,}, {_ROOM} times its size of {self.size:,}): they stay "
                "with the zones that had them; drop zones, or set a larger size "
                "(zone_map.configure) before the first zone is made",
                errno=errno.ENOMEM,
                requested=length,
                available=self.end - self._next,
            )
        self._next += length
        return self._next - length

    def _put_back(self, start: int, end: int) -> None:
        insort(self._free, (start, end))
        merged: list[tuple[int, int]] = []
        for left, right in self._free:
            if merged and merged[-1][1] == left:
                merged[-1] = merged[-1][0], right
            else:
                merged.append((left, right))
        self._free = merged

    def charge(self, chunk: ZoneChunk) -> None:
        """Count a chunk that a zone is about to hold, or raise if there is no room for it."""
        length = chunk.length
        with self._lock:
            self._check_idle()
            self._busy = True
            try:
                self._settle()
                self._check_room(length)
                # No call in between, after which an interrupt could strike.
                self.charged[chunk.address] = length
                self._counted += 1
                self.used += length
                chunk.held = True
                self.peak = max(self.peak, self.used)
                if not self._warned and self._is_nearly_full():
                    self._warned = True
                    self.due.append(True)
            finally:
                self._busy = False

    def _check_room(self, length: int) -> None:
        if self.used + length > self.size:
            raise AllocationError(
                f"the zone map is full: {self.used:,} of {self.size:,} bytes are in use, "
                f"{length:,} more are needed; free elements, or set a larger size "
                "(zone_map.configure) before the first zone is made",
                errno=errno.ENOMEM,
                requested=length,
                available=self.size - self.used,
            )
        if self.used + length > self._checked:
            self._checked = self.used + _check_machine(length)

    def _is_nearly_full(self) -> bool:
        return self.used * 100 >= self.settings.percent * self.size

    def _settle(self) -> None:
        """Take in what was given back."""
        while self.returned:
            address, length = self.returned.popleft()
            self._put_back(address, address + length)
        if len(self.charged) != self._counted:
            lengths = tuple(self.charged.values())
            self.used, self._counted = sum(lengths), len(lengths)
        self._checked = min(self._checked, self.used + _CHECKED)
        if not self._is_nearly_full():
            self._warned = False

    def rearm(self) -> None:
        """Warn again at the next charge, if it is nearly full then."""
        with self._lock:
            self._warned = False

    def statistics(self) -> ZoneMapStatistics:
        with self._lock:
            if not self._busy:
                self._settle()
            free = sum(end - start for start, end in self._free) + self.end - self._next
            return ZoneMapStatistics(
                size=self.size,
                used=self.used,
                peak=self.peak,
                addresses=self.memory.length,
                addresses_used=self.memory.length - free,
            )


def _check_machine(length: int) -> int:
    """Raise unless the machine has that many bytes; give how many it was seen to have."""
    try:
        if limits.available().nbytes >= _CHECKED:
            return _CHECKED
        limits.check_available(length, "a chunk of a zone")
        return length
    except AllocationError:
        raise
    except OSError as error:
        raise AllocationError(
            f"a zone takes no memory while it can not see how much there is: {error}; close "
            "descriptors, or raise `ulimit -n`",
            errno=error.errno,
            requested=length,
        ) from error


def _reserve(length: int) -> _core.MappedMemory:
    try:
        memory = _core.reserve_memory(length)
    except OSError as error:
        raise AllocationError(
            f"no {length:,} bytes of addresses for the zone map: {describe_errno(error)}; set a "
            f"smaller size (zone_map.configure; {_ROOM} times as many addresses are needed), or "
            "raise `ulimit -v`",
            errno=error.errno,
            requested=length,
        ) from error
    # A huge page would come for one chunk and belong to many, and go when all of them do. A kernel
    # without huge pages refuses; one without names for memory too: they are for people.
    with suppress(OSError):
        _core.madvise(memory.address, length, _core.MADV_NOHUGEPAGE)
    with suppress(OSError):
        _core.name_memory(memory.address, length, NAME.encode())
    return memory


def _unavailable(error: OSError, length: int) -> AllocationError:
    return AllocationError(
        f"{length:,} bytes for a chunk of a zone can not be had: {describe_errno(error)}; free "
        "memory, or unmap regions where vm.max_map_count is reached",
        errno=error.errno,
        requested=length,
    )


_settings = _Settings()
_maps: list[_Map] = []
"""The map of this process is the last one; before it come those of its parents, inherited."""
_inherited = 0


def _map() -> _Map:
    """Give this process's map; it is made when the first zone is."""
    if len(_maps) == _inherited:
        new = _Map(_settings)
        if not _maps:
            os.register_at_fork(after_in_child=_start_anew)
        if len(_maps) == _inherited:
            _maps.append(new)
    return _maps[_inherited]


def _start_anew() -> None:
    """In a fork child: what the parent's zones hold stays as it is, out of use."""
    global _inherited
    _inherited = len(_maps)


class ZoneChunk:
    """A part of the zone map that belongs to one zone. Goes back when the last holder lets go.

    Attributes
    ----------
    address, length : int
        Whole pages, in bytes. The addresses are this chunk's for its whole life.
    held : bool
        Whether its pages are in memory and count; if not, they are with the kernel.
    claim : object
        What keeps it wired; let go before its pages are.
    """

    __slots__ = ("_map", "address", "claim", "held", "length")

    def __init__(self, length: int) -> None:
        self.held = False
        self.claim: object = None
        self._map = _map()
        self.length = 0  # nothing to give back, should the next line raise
        self.address = self._map.take(length)
        self.length = length

    def hold(self) -> None:
        """Get its pages, all zero; again is a no-op.

        Raises
        ------
        AllocationError
            The zone map is full, or the machine has no memory; nothing changed.
        """
        if self.held:
            return
        self._map.charge(self)
        try:
            _core.madvise(self.address, self.length, _core.MADV_POPULATE_WRITE)
        except OSError as error:
            self.let_go()
            raise _unavailable(error, self.length) from error

    def let_go(self) -> bool:
        """Give its pages to the kernel; the addresses stay, and read as zero.

        False, and nothing changed, where the program has locked them itself (mlockall).
        """
        self.claim = None
        if self.held:
            try:
                _core.madvise(self.address, self.length, mmap.MADV_DONTNEED)
            except OSError:
                return False
            self.held = False
            self._map.charged.pop(self.address, None)
        return True

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # In a fork child the pages are a copy, and the map that they would go back to is no
        # longer used; at the interpreter's end all of it goes.
        if not getattr(self, "length", 0) or _ending() or self._map not in _maps[_inherited:]:
            return
        self.claim = None
        try:
            _core.madvise(self.address, self.length, mmap.MADV_DONTNEED)
        except OSError:  # locked by the program itself: these addresses can not be given to others
            return
        self._map.charged.pop(self.address, None)
        self._map.returned.append((self.address, self.length))


def configure(*, size: int) -> None:
    """Set how many bytes all zones of this process may hold together; 1 GiB unless set.

    Parameters
    ----------
    size : int
        Bytes, rounded up to pages. Four times as many addresses are reserved.

    Raises
    ------
    InvalidArgument
        Less than a page, more addresses than there are, or the first zone was made already
        (EBUSY): the size is fixed from then on.

    Notes
    -----
    Linux: mmap(PROT_NONE) at the first zone; `ulimit -v` counts the addresses. XNU: the boot-arg
    zsize. Fork: a child may set its own before its first zone.
    """
    size = round_page(check_length(size, "size of the zone map"))
    if size > MAX_LENGTH // _ROOM:
        raise InvalidArgument(
            f"a zone map of {size:,} bytes has no room in any address space", errno=errno.EINVAL
        )
    if len(_maps) > _inherited:
        raise InvalidArgument(
            f"the zone map has {_map().size:,} bytes since the first zone was made: set {size:,} "
            "before that",
            errno=errno.EBUSY,
        )
    _settings.size = size


def set_warning(
    callback: Callable[[ZoneMapStatistics], object] | None, *, percent: int = 95
) -> None:
    """Have a function called when the zone map becomes nearly full.

    Parameters
    ----------
    callback : callable or None
        Called with the statistics, once each time that use rises to `percent`, by the thread whose
        `alloc` made it so and while no lock is held: it may free, collect and allocate. What
        it raises comes out of that `alloc`, which then has taken no element. None: no warning.
    percent : int
        1 to 100, of the size.

    Raises
    ------
    InvalidArgument
        Not 1 to 100; not callable.
    """
    if callback is not None and not callable(callback):
        raise InvalidArgument(
            f"callback is of type {type(callback).__name__}: give a function", errno=errno.EINVAL
        )
    if not 1 <= check_integer(percent, "percent") <= 100:
        raise InvalidArgument(
            f"percent is {percent}: give 1 to 100, of the zone map's size", errno=errno.EINVAL
        )
    _settings.warning, _settings.percent = callback, percent
    if len(_maps) > _inherited:
        _map().rearm()


def statistics() -> ZoneMapStatistics:
    """Tell how full the zone map is. It is made, if it was not yet.

    Examples
    --------
    >>> statistics().used <= statistics().size
    True
    """
    return _map().statistics()


def warn_if_due() -> None:
    """Call the callback, if what was just charged made the map nearly full. Hold no lock."""
    map_ = _map()
    try:
        map_.due.popleft()
    except IndexError:  # none is due, or another thread gives it
        return
    if _settings.warning is not None:
        _settings.warning(map_.statistics())


def size() -> int:
    """Bytes that all zones together may hold."""
    return _map().size if len(_maps) > _inherited else _settings.size


def contains(address: int, length: int) -> bool:
    """Whether any of `length` bytes at an address of this task is memory of zones."""
    end = address + length
    return any(address < map_.end and map_.memory.address < end for map_ in _maps)
