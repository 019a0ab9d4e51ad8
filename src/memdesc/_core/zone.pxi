# The element list of a zone (zone.h) as Python objects; included by _native.pyx.
#
# Every function here runs under the GIL from its first line to its last: it is the lock of the
# element list. So no thread, signal handler or collector ever meets a list half changed. What
# this takes is bounded by one element: looking at it, or clearing it.

cdef extern from "zone.h":
    struct md_slot:
        uint32_t chunk
        uint32_t index
    struct md_chunk:
        unsigned char *base
        uint32_t slots
        uint32_t used
        bint retired
        uint64_t *entries
    struct md_zone:
        size_t element_size
        size_t stride
        md_chunk **chunks
        uint32_t chunk_count
        uint32_t retired_count
        size_t free_count
        size_t slot_count
        uint64_t allocs
        uint64_t frees
        uint64_t drops
        uint64_t quarantined
        size_t living
        size_t peak_living
    uint64_t MD_SLOT_FREE
    uint64_t MD_SLOT_QUARANTINED
    int md_zone_add(md_zone *, unsigned char *, uint32_t)
    int md_zone_take(md_zone *, md_slot *, size_t *)
    void md_zone_give(md_zone *, md_slot)
    int md_zone_find(const md_zone *, uintptr_t, md_slot *)
    unsigned char *md_slot_address(const md_zone *, md_slot)
    uint32_t md_zone_retire(md_zone *)
    int md_zone_revive(md_zone *, uint32_t)
    void md_zone_clear(md_zone *)


@cython.final
@cython.no_gc  # holds nothing that could lead back to it
cdef class _Elements:
    """The list of one zone. Its elements hold it, so it and its memory outlive the zone."""

    cdef md_zone zone
    cdef size_t most     # slots that all chunks together may have
    cdef bint asks       # every allocation goes to Python: closed, tracked, or of the parent
    cdef bint inherited  # of the parent of this forked process: nothing here changes any more
    cdef list chunks     # what the memory of each chunk lives by; the zone's own list
    cdef object waiters  # deque of held locks: one is released for each element that comes free
    cdef dict sites      # where each living element was allocated; None unless tracked
    cdef object owner    # weak reference to the zone
    cdef object make_array

    def __dealloc__(self):
        md_zone_clear(&self.zone)

    cdef int give(self, ZoneElement element) except -1:
        """Take an element back; the caller has seen that it is living and has no view."""
        element.state = FREED
        if self.inherited:
            return 0
        if self.sites is not None:
            self.sites.pop(element.number, None)
        md_zone_give(&self.zone, element.slot)
        if PyObject_Size(self.waiters):
            self.waiters.popleft().release()
        return 0


cdef enum:
    LIVING = 1
    LEAVING = 2  # freed as soon as its last view goes
    FREED = 3


@cython.final
@cython.no_gc
@cython.nonecheck(True)  # ZoneElement.__new__, which Python code can call, gives one of no list
cdef class ZoneElement:
    """An element of a zone: a writable buffer that counts its views.

    `number` tells which allocation of its zone it is, from 1; `exports` how many views it has.
    """

    cdef _Elements elements
    cdef md_slot slot
    cdef unsigned char *at
    cdef readonly Py_ssize_t exports
    cdef readonly uint64_t number
    cdef int state

    def __init__(self):
        raise TypeError("made by Zone.alloc()")

    def __dealloc__(self):
        if self.state == LIVING or self.state == LEAVING:
            self.elements.zone.drops += 1
            self.elements.give(self)

    @property
    def address(self):
        """Of its first byte, in this task."""
        return <uintptr_t>self.at

    @property
    def living(self):
        """Whether it is still this object's: neither freed nor about to be."""
        return self.state == LIVING

    @property
    def zone(self):
        """The zone that it is of; None where that is gone (the element's memory is not)."""
        return self.elements.owner()

    def array(self, shape=None, dtype=None, *, order="C", offset=0):
        """View it as a NumPy array; by default as bytes. See `memdesc.mapping.view_as_array`.

        A view of it: it goes before `Zone.free`, and keeps an element that was dropped alive.
        """
        return self.elements.make_array(self, len(self), shape, dtype, order=order, offset=offset)

    def __len__(self):
        return self.elements.zone.element_size

    def __repr__(self):
        state = {LIVING: "", LEAVING: ", freed when its last view goes", FREED: ", freed"}
        owner = self.elements.owner()
        return (f"<ZoneElement number {self.number} of {owner or 'a zone that is gone'}: "
                f"{len(self)} bytes at {self.address:#x}{state[self.state]}>")

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.state != LIVING:
            raise BufferError("this element was freed: a view would be of memory that is given "
                              "to others; allocate a new one")
        view.buf = self.at
        view.obj = self
        view.len = <Py_ssize_t>self.elements.zone.element_size
        view.readonly = 0
        view.itemsize = 1
        view.format = BYTES if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        cdef PyObject *kind
        cdef PyObject *value
        cdef PyObject *trace
        self.exports -= 1
        if self.state == LEAVING and not self.exports:
            # Views go while an exception unwinds the stack, too; no call succeeds under it.
            PyErr_Fetch(&kind, &value, &trace)
            self.leave()
            PyErr_Restore(kind, value, trace)

    cdef void leave(self) noexcept:
        self.elements.zone.frees += 1
        self.elements.give(self)

    def __reduce__(self):
        raise TypeError(
            "ZoneElement can not be pickled: zone memory never leaves its task; for a copy of its "
            "bytes pickle bytes(element)"
        )


cdef class ElementList:
    """Base of `Zone`: its fast half. What is slow or goes wrong is the subclass's `_alloc`,
    `_free` and `_changed`."""

    cdef _Elements _elements
    cdef object __weakref__

    def __cinit__(self):
        self._elements = _Elements.__new__(_Elements)  # empty: gives nothing until _begin()
        self._elements.asks = True

    def alloc(self, timeout=0):
        """Take an element: `element_size` zero bytes, in constant time.

        Parameters
        ----------
        timeout : float or None
            Seconds to wait for one to come free, where none is; None for as long as it takes.
            Waiting gives way to signals.

        Returns
        -------
        ZoneElement
            A writable buffer. Give it back with `free`; one that is dropped goes back by itself.

        Raises
        ------
        ZoneExhausted
            None is free (ENOMEM), or none came free in time (ETIMEDOUT).
        UseAfterFreeError
            The element was written to after it was freed. It is never given out again; the next
            call gives another one.
        ClosedError
            The zone was closed, or belongs to the parent of this forked process.

        Notes
        -----
        XNU: zalloc; `timeout=0` is Z_NOWAIT there. Threads: safe.
        """
        cdef ZoneElement element
        if not self._elements.asks:
            element = self.take()
            if element is not None:
                return element
        return self._alloc(timeout)

    def free(self, element):
        """Give an element back, in constant time; it is cleared.

        Raises
        ------
        BufferError
            Views of it are alive (`memoryview`, NumPy arrays): they would show memory of others.
        DoubleFreeError
            It was freed before.
        InvalidArgument
            It is no element of this zone.
        ClosedError
            It belongs to the parent of this forked process.

        Notes
        -----
        XNU: zfree, which panics for all of these. Also after `close`. Threads: safe.
        """
        cdef ZoneElement mine
        if type(element) is ZoneElement:
            mine = <ZoneElement>element
            if (mine.elements is self._elements and mine.state == LIVING and not mine.exports
                    and not mine.elements.inherited):
                mine.elements.zone.frees += 1
                mine.elements.give(mine)
                return
        self._free(element)

    cdef ZoneElement take(self):
        """Take a free element, or None where there is none."""
        cdef _Elements elements = self._elements
        cdef md_slot slot
        cdef size_t where = 0
        if elements.zone.free_count == 0:
            return None
        # Before a slot is taken: what makes an object may fail for want of memory.
        cdef ZoneElement element = ZoneElement.__new__(ZoneElement)
        cdef int rc = md_zone_take(&elements.zone, &slot, &where)
        cdef unsigned char *at = md_slot_address(&elements.zone, slot)
        if rc < 0:
            self._changed(<uintptr_t>at, where, at[where])
            raise SystemError("_changed() did not raise")
        element.elements = elements
        element.slot = slot
        element.at = at
        element.number = elements.zone.allocs
        element.state = LIVING
        return element

    # What follows is for the subclass, and quick only where it says so.

    def _begin(self, size_t element_size, size_t stride, size_t most, list chunks not None,
               waiters not None, sites, make_array):
        """Once, before anything else. `waiters`: a deque; `sites`: a dict where they are kept."""
        cdef _Elements elements = self._elements
        if elements.zone.stride:
            raise TypeError("a zone begins once")
        if not 0 < element_size <= stride:
            raise ValueError("_begin: an element does not fit into its stride")
        elements.zone.element_size = element_size
        elements.zone.stride = stride
        elements.most = most
        elements.chunks = chunks
        elements.waiters = waiters
        elements.sites = sites
        elements.make_array = make_array
        elements.owner = PyWeakref_NewRef(self, None)
        elements.asks = sites is not None

    def _take(self):
        return self.take()

    def _add_chunk(self, size_t base, size_t slots, chunk):
        """Add zero memory, which lives as long as `chunk`; fewer slots where that is too many.

        Gives how many: none where the zone has all that it may have.
        """
        cdef _Elements elements = self._elements
        slots = min(slots, elements.most - elements.zone.slot_count, UINT32_MAX)
        if slots == 0:
            return 0
        elements.chunks.append(chunk)
        if md_zone_add(&elements.zone, <unsigned char *>base, <uint32_t>slots) < 0:
            elements.chunks.pop()
            raise MemoryError(f"no memory for the books of {slots} elements")
        return slots

    def _retire(self):
        """Take all chunks without a used slot off the list; give the numbers of all retired."""
        cdef uint32_t number
        md_zone_retire(&self._elements.zone)
        return [number for number in range(self._elements.zone.chunk_count)
                if self._elements.zone.chunks[number].retired]

    def _first_retired(self):
        """The number of a retired chunk; None where there is none."""
        cdef uint32_t number
        if self._elements.zone.retired_count:
            for number in range(self._elements.zone.chunk_count):
                if self._elements.zone.chunks[number].retired:
                    return number
        return None

    def _revive(self, uint32_t number):
        """Put a retired chunk, whose memory is zero again, back on the list; tell if it was one."""
        if number >= self._elements.zone.chunk_count:
            raise IndexError("_revive: no such chunk")
        return md_zone_revive(&self._elements.zone, number) == 0

    def _ask(self):
        """From here on every allocation goes to `_alloc`."""
        self._elements.asks = True

    def _inherit(self):
        """In a fork child: from here on nothing changes any more."""
        self._elements.asks = self._elements.inherited = True

    def _find(self, size_t address):
        """The element whose stride an address lies in: (its address, its number); else None.

        The number is 0 where the slot is free, -1 where it is quarantined.
        """
        cdef md_slot slot
        cdef uint64_t entry
        if md_zone_find(&self._elements.zone, address, &slot) < 0:
            return None
        entry = self._elements.zone.chunks[slot.chunk].entries[slot.index]
        return (<uintptr_t>md_slot_address(&self._elements.zone, slot),
                -1 if entry == MD_SLOT_QUARANTINED else entry)

    def _living(self):
        """The number of every living element, as the chunks lie."""
        cdef uint32_t chunk, index
        cdef uint64_t entry
        found = []
        for chunk in range(self._elements.zone.chunk_count):
            for index in range(self._elements.zone.chunks[chunk].slots):
                entry = self._elements.zone.chunks[chunk].entries[index]
                if entry != MD_SLOT_FREE and entry != MD_SLOT_QUARANTINED:
                    found.append(entry)
        return found

    def _span(self):
        """The least and the greatest number of a living element; (0, 0) where there is none."""
        cdef uint32_t chunk, index
        cdef uint64_t entry, least = UINT64_MAX, greatest = 0
        for chunk in range(self._elements.zone.chunk_count):
            for index in range(self._elements.zone.chunks[chunk].slots):
                entry = self._elements.zone.chunks[chunk].entries[index]
                if entry != MD_SLOT_FREE and entry != MD_SLOT_QUARANTINED:
                    least, greatest = min(least, entry), max(greatest, entry)
        return least if greatest else 0, greatest

    def _let_go(self, ZoneElement element not None):
        """Free an element as soon as no view needs it."""
        if element.state != LIVING:
            return
        if element.exports:
            element.state = LEAVING
        else:
            element.elements.zone.frees += 1
            element.elements.give(element)

    def _counts(self):
        """allocs, frees, drops, quarantined, living, most ever living."""
        cdef md_zone *zone = &self._elements.zone
        return (zone.allocs, zone.frees, zone.drops, zone.quarantined, zone.living,
                zone.peak_living)

    def _slots(self):
        """Free slots, slots of all chunks, chunks, those of them that are retired."""
        cdef md_zone *zone = &self._elements.zone
        return zone.free_count, zone.slot_count, zone.chunk_count, zone.retired_count
