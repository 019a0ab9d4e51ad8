"""The memory of one zone: chunks taken of the zone map, given to the kernel and taken back.

The list of elements is compiled (`_core.ElementList`, under the interpreter's lock); here is where
it grows and shrinks. Lock order: a zone's lock, then the zone map's. No zone takes another
one's lock but by trying, and no callback runs under any. The locks are reentrant, for signal
handlers and finalizers; one that meets its own thread in the middle of a change is refused.
An interrupt may strike between any two steps: what is left then is in order, or put in order by
the next collection.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import deque

from memdesc import _core
from memdesc.alloc.layout import Layout
from memdesc.errors import AllocationError, ClosedError
from memdesc.mapping import view_as_array
from memdesc.memory.zone_map import ZoneChunk
from memdesc.vm.forks import lock_for
from memdesc.wiring import wire

_refs: set[weakref.ref[ChunkList]] = set()
_hooked = False


def living_zones() -> list[ChunkList]:
    """All zones of this process; those that were dropped leave by themselves."""
    refs = tuple(_refs)  # one step for the interpreter: other threads make zones meanwhile
    return [zone for ref in refs if (zone := ref()) is not None]


class ChunkList(_core.ElementList):
    """The elements of one zone, and the chunks that they lie in."""

    def __init__(self, name: str, layout: Layout, wired: bool, track: bool) -> None:
        global _hooked
        chunks: list[ZoneChunk] = []
        waiters: deque[threading.Lock] = deque()
        sites: dict[int, str] | None = {} if track else None
        most = layout.max_elements
        size, stride = layout.element_size, layout.stride
        self._begin(size, stride, most, chunks, waiters, sites, view_as_array)
        self._chunks, self._waiters, self._sites = chunks, waiters, sites
        self.name = name
        self.wired = wired
        self._layout = layout
        self._pid = os.getpid()
        self._closed = False
        self._failures = self._waits = self._collected = self._peak_size = 0
        self._lock = lock_for(self)
        self._busy = False
        if not _hooked:
            _hooked = True
            os.register_at_fork(after_in_child=_disown)
        _refs.add(weakref.ref(self, _refs.discard))

    def _grow(self) -> bool:
        """See to it that an element is free; False where the zone has all that it may have."""
        with self._lock:
            if self._busy:
                raise AllocationError(
                    f"zone {self.name!r} can not grow in a signal handler or finalizer that "
                    "interrupted its own thread in the middle of growing or collecting it: "
                    "allocate outside of it",
                    errno=errno.EDEADLK,
                )
            self._busy = True
            try:
                return self._slots()[0] > 0 or self._refill() or self._extend()
            finally:
                self._busy = False

    def _refill(self) -> bool:
        """Get the pages of a chunk back."""
        number = self._first_retired()
        if number is None:
            return False
        self._chunks[number].hold()
        self._revive(number)
        self._note_peak()
        return True

    def _extend(self) -> bool:
        """Add a chunk; False where there are as many elements as there may be."""
        if self._slots()[1] == self._layout.max_elements:
            return False
        chunk = ZoneChunk(self._layout.chunk_length)
        try:
            chunk.hold()
            if self.wired:
                chunk.claim = wire(chunk.address, chunk.length)
            self._add_chunk(chunk.address, self._layout.chunk_elements, chunk)
        except BaseException:
            chunk.let_go()  # now: the traceback holds on to it
            raise
        self._note_peak()
        return True

    def _note_peak(self) -> None:
        self._peak_size = max(self._peak_size, self._held())

    def _held(self) -> int:
        _, _, chunks, retired = self._slots()
        return (chunks - retired) * self._layout.chunk_length

    def collect(self) -> int:
        """Give the pages of chunks without an element back to the kernel.

        The addresses stay the zone's: no other zone gets them, and it takes the pages again
        when it needs them. What was written there after it was freed is forgotten unseen.

        Returns
        -------
        int
            Bytes given back; 0 for a wired zone.

        Raises
        ------
        ClosedError
            The zone belongs to the parent of this forked process.

        Notes
        -----
        Linux: madvise(MADV_DONTNEED). XNU: zone_gc, at the level of ZONE_GC_DRAIN.
        """
        self._check_own()
        return 0 if self.wired and not self._closed else self._collect()

    def _collect(self) -> int:
        with self._lock:
            if self._busy:  # a signal handler or finalizer: its own thread is at it
                return 0
            self._busy = True
            try:
                return self._give_back()
            finally:
                self._busy = False

    def _give_back(self) -> int:
        given_back = 0
        for number in self._retire():
            chunk = self._chunks[number]
            held = chunk.held
            if not chunk.let_go():
                self._revive(number)
            elif held:
                given_back += chunk.length
        self._collected += given_back
        return given_back

    def _check_own(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError(
                f"zone {self.name!r} belongs to the parent ({self._pid}) of this forked process: "
                "make a zone here"
            )


def _disown() -> None:
    """In a fork child: the zones and their elements are the parent's."""
    for zone in living_zones():
        zone._inherit()
    _refs.clear()


def collect_zones() -> int:
    """Let every zone of this process give its empty chunks back to the kernel; tell the bytes.

    Done by itself where an allocation finds the zone map or the machine full. Zones that
    another thread is just growing are passed over.
    """
    given_back = 0
    for zone in living_zones():
        with _core.Attempt(zone._lock) as free:
            if free:
                given_back += zone.collect()
    return given_back
