# The two ends of a stream (offers.h) as Python objects; included by _native.pyx.
#
# Everything but waiting runs under the GIL from its first line to its last: it is the lock of an
# end. What is slow or goes wrong is left to the subclass.

from cpython.list cimport PyList_GetItem
from libc.stdlib cimport calloc, free

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *)

cdef extern from "errno.h":
    enum:
        C_EAGAIN "EAGAIN"

cdef extern from "offers.h" nogil:
    struct md_offers:
        uint64_t written
        uint64_t wanted
        uint32_t bell
        uint32_t ended
        uint64_t magic
        uint64_t read
        uint64_t subscriber_wanted
        uint32_t subscriber_bell
        uint32_t subscriber_ended
        uint64_t *released
    struct md_cell:
        pass
    struct md_slot_header:
        unsigned char *data
    struct md_wait:
        void *position
        void *wanted
        void *bell
        void *ended
        void *gone
        uint64_t *sleeps
    struct md_offer:
        pass
    struct md_line:
        md_offers *shared
        md_cell *cells
        md_offer *offered
        md_offer *held
        uint64_t written
        uint64_t read
        uint32_t depth
        uint32_t loans
        uint32_t holding
        int policy
        int state
        int ended
        int bell_fd
        int gone
        uint64_t offers
        uint64_t dropped
        uint64_t rung
        uint64_t sleeps
    struct md_pool:
        uint32_t slots
        uint32_t loans
        uint32_t most_loans
        uint32_t free_count
        uint64_t sequence
        uint32_t line_count
        uint32_t events
        uint64_t published
        uint64_t discarded
        uint64_t nbytes
    struct md_taker:
        md_offers *shared
        md_cell *cells
        const unsigned char *headers
        size_t header_size
        size_t metadata_limit
        size_t slot_size
        uint32_t slots
        uint32_t depth
        uint32_t loans
        uint32_t holding
        uint64_t sequence
        uint64_t read
        int broken
        int gone
        uint64_t taken
        uint64_t missed
        uint64_t nbytes
        uint64_t rung
        uint64_t sleeps
    struct md_taken:
        uint32_t slot
        uint64_t sequence
        uint64_t timestamp
        uint64_t nbytes
        uint64_t metadata
    uint64_t MD_OFFERS_MAGIC
    int MD_LINE_GONE
    int MD_ENDED_CLOSED
    size_t md_offers_size(uint32_t, uint32_t)
    md_cell *md_offers_cells(md_offers *, uint32_t)
    int md_offers_sleep(const md_wait *, uint64_t, uint64_t, uint64_t)
    int md_pool_begin(md_pool *, unsigned char *, size_t, uint32_t, uint32_t)
    void md_pool_clear(md_pool *)
    uint64_t md_pool_reserved(const md_pool *, int, uint32_t, uint32_t)
    void md_pool_refresh(md_pool *)
    int md_pool_add(md_pool *, md_line *, int)
    void md_pool_remove(md_pool *, md_line *)
    md_line *md_pool_blocked(md_pool *)
    uint64_t md_pool_awaited(md_pool *, md_line *)
    int md_pool_loan(md_pool *, uint32_t *)
    void md_pool_discard(md_pool *, uint32_t)
    void md_pool_publish(md_pool *, uint32_t, uint64_t, const void *, size_t)
    void md_line_refresh(md_pool *, md_line *)
    void md_line_end(md_pool *, md_line *, int, int)
    void md_line_farewell(md_line *)
    int64_t md_taker_pending(md_taker *)
    int md_taker_take(md_taker *, md_taken *)
    void md_taker_give(md_taker *, uint32_t, uint64_t)
    uint32_t md_taker_ended(md_taker *)
    void md_taker_want(md_taker *)
    void md_taker_close(md_taker *)
    void md_taker_stop(md_taker *)
    size_t C_HEADER_SIZE "sizeof(struct md_slot_header)"
    size_t C_OFFERS_SIZE "sizeof(struct md_offers)"
    size_t C_WRITTEN "offsetof(struct md_offers, written)"
    size_t C_OFFERS_WANTED "offsetof(struct md_offers, wanted)"
    size_t C_OFFERS_BELL "offsetof(struct md_offers, bell)"
    size_t C_ENDED "offsetof(struct md_offers, ended)"
    size_t C_OFFERS_MAGIC "offsetof(struct md_offers, magic)"
    size_t C_READ "offsetof(struct md_offers, read)"
    size_t C_SUBSCRIBER_WANTED "offsetof(struct md_offers, subscriber_wanted)"
    size_t C_SUBSCRIBER_BELL "offsetof(struct md_offers, subscriber_bell)"
    size_t C_SUBSCRIBER_ENDED "offsetof(struct md_offers, subscriber_ended)"
    size_t C_RELEASED "offsetof(struct md_offers, released)"

OFFERS_MAGIC = MD_OFFERS_MAGIC
OFFERS_OFFSETS = {
    "written": C_WRITTEN, "wanted": C_OFFERS_WANTED, "bell": C_OFFERS_BELL, "ended": C_ENDED,
    "magic": C_OFFERS_MAGIC, "read": C_READ, "subscriber_wanted": C_SUBSCRIBER_WANTED,
    "subscriber_bell": C_SUBSCRIBER_BELL, "subscriber_ended": C_SUBSCRIBER_ENDED,
    "released": C_RELEASED,
}

cdef size_t LARGE = 1 << 20
"""Bytes of a slot from which on a loan looks which came back: filling another would cost more."""

cdef uint64_t _forks = 0  # of this process, from its first ancestor on


def note_fork():
    """In a fork child: the ends of streams that it inherited are the parent's."""
    global _forks
    _forks += 1


cdef int _sleep_on(const md_wait *wait, uint64_t wanted, uint64_t spin, uint64_t limit) except -1:
    """1: look again; 0: the time ran out, or a signal came, whose handlers have run."""
    cdef int rc
    with nogil:
        rc = md_offers_sleep(wait, wanted, spin, limit)
    PyErr_CheckSignals()
    if rc < 0 and rc != -C_EINTR and rc != -C_ETIMEDOUT:
        _check(rc, "futex")
    return rc == 0


# --- The publisher ------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear
cdef class StreamLine:
    """What the publisher knows of one subscriber; made by `StreamPool._add`."""

    cdef md_line line
    cdef MappedMemory memory
    cdef readonly object subscriber  # the subclass's record
    cdef object __weakref__

    def __init__(self):
        raise TypeError("made by StreamPool._add()")

    def __dealloc__(self):
        free(self.line.offered)
        free(self.line.held)

    def state(self):
        """1: open; 2: leaves, and holds slots still; 3: gone. And why: 0, or the reason told."""
        return self.line.state, self.line.ended

    def counts(self):
        """offers, dropped, wakings, pending, held, as last looked at."""
        cdef md_line *line = &self.line
        return line.offers, line.dropped, line.rung, line.written - line.read, line.holding

    def sleep(self, uint64_t wanted, uint64_t spin, uint64_t limit):
        """Wait until so many offers were taken out, or the line ends; False: time, or a signal."""
        cdef md_wait wait
        if self.line.shared == NULL:
            raise TypeError("made by StreamPool._add()")
        wait.position = &self.line.shared.read
        wait.wanted = &self.line.shared.wanted
        wait.bell = &self.line.shared.subscriber_bell
        wait.ended = &self.line.shared.subscriber_ended
        wait.gone = &self.line.gone
        wait.sleeps = &self.line.sleeps
        return bool(_sleep_on(&wait, wanted, spin, limit))


@cython.no_gc_clear  # as StreamSubscriber
cdef class StreamPool:
    """Base of `Stream`: its fast half."""

    cdef md_pool pool
    cdef MappedMemory memory
    cdef size_t first, stride, slot_size, metadata_limit
    cdef list lines, arrays
    cdef object make_array, encode
    cdef uint64_t forks
    cdef int state
    cdef object __weakref__

    def __dealloc__(self):
        if self.state == OPEN and self.forks == _forks:
            for line in self.lines:
                md_line_farewell(&(<StreamLine>line).line)
        md_pool_clear(&self.pool)

    def _begin(self, Window window not None, size_t header_size, uint32_t slots, size_t stride,
               size_t slot_size, uint32_t loans, make_array, encode):
        """Once, before anything else. The window: headers, page-rounded, then the slots."""
        cdef size_t room = <size_t>window.nbytes
        if self.state:
            raise TypeError("a pool begins once")
        if (not window.writable or not slots or not loans or header_size < C_HEADER_SIZE
                or header_size % 8 or slot_size > stride or stride > room // slots
                or header_size > (room - slots * stride) // slots):
            raise ValueError("_begin: no memory for a pool")
        cdef unsigned char *headers = <unsigned char *><size_t>(window.memory.address
                                                                 + window.offset)
        if md_pool_begin(&self.pool, headers, header_size, slots, loans) < 0:
            raise MemoryError("no memory for the books of a pool")
        self.memory = window.memory
        self.first = window.offset + room - slots * stride
        self.stride, self.slot_size = stride, slot_size
        self.metadata_limit = header_size - C_HEADER_SIZE
        self.lines = []
        self.arrays = [None] * slots
        self.make_array, self.encode = make_array, encode
        self.forks = _forks
        self.state = OPEN

    cdef int ready(self) except -1:
        if self.state != OPEN or self.forks != _forks:
            self._closed()
            raise SystemError("_closed() did not raise")
        return 0

    cdef LoanedSlot take(self):
        """A slot to fill; None where a subscriber has no room for it yet."""
        cdef uint32_t index = 0
        self.ready()
        cdef LoanedSlot slot = LoanedSlot.__new__(LoanedSlot)  # first: it may fail
        if self.slot_size >= LARGE:
            md_pool_refresh(&self.pool)
        cdef int rc = md_pool_loan(&self.pool, &index)
        if rc == -C_EAGAIN:
            return None
        if rc < 0:
            self._too_many_loans()
            raise SystemError("_too_many_loans() did not raise")
        slot.stream = self
        slot.index = index
        slot.state = LOANED
        slot.nbytes_ = self.slot_size
        return slot

    def loan(self, timeout=None):
        """Take a slot to fill in place.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for subscribers of policy BLOCK, where there are some; None waits for
            ever, 0 not at all. Of the other policies nobody is ever waited for.

        Returns
        -------
        LoanedSlot
            Published on leaving its ``with`` block, or by `LoanedSlot.publish`; discarded by an
            exception, by `LoanedSlot.discard`, or when it is dropped.

        Raises
        ------
        TimedOutError
            A subscriber of policy BLOCK had no room in time (ETIMEDOUT; EAGAIN: none was given).
        AllocationError
            As many slots are loaned as this stream was made for (ENOBUFS).
        ClosedError
            The stream was closed, or belongs to the parent of this forked process.

        Notes
        -----
        What the slot holds is what was last in it. I/O Kit has no such thing; PipeWire's
        ``pw_stream_dequeue_buffer`` is nearest. Threads: safe.
        """
        cdef LoanedSlot slot = self.take()
        cdef int turn
        if slot is None and (timeout is None or timeout):
            for turn in range(SHORT_SPIN):  # as StreamSubscriber.take
                md_ring_pause()
                md_pool_refresh(&self.pool)
                if md_pool_blocked(&self.pool) == NULL:
                    slot = self.take()
                    break
        if slot is None:
            return self._loan(timeout)
        if self.pool.events:
            self._tidy()
        return slot

    def _take(self):
        return self.take()

    def _blocked(self):
        """Who has no room for a loan more: (line, how many it must have taken out); else None."""
        self.ready()
        md_pool_refresh(&self.pool)
        cdef md_line *blocked = md_pool_blocked(&self.pool)
        if blocked != NULL:
            for line in self.lines:
                if &(<StreamLine>line).line == blocked:
                    return line, md_pool_awaited(&self.pool, blocked)
        return None

    def _add(self, Window window not None, uint32_t depth, uint32_t loans, int policy,
             int bell_fd, bint latest, subscriber):
        """Have a subscriber more, on memory that is zero but for what this writes to it."""
        cdef StreamLine line
        cdef size_t base = window.memory.address + window.offset
        self.ready()
        if (not window.writable or base % 64 or not depth or not loans or not 0 <= policy <= 3
                or <size_t>window.nbytes < md_offers_size(self.pool.slots, depth)):
            raise ValueError("_add: no memory for a line")
        line = StreamLine.__new__(StreamLine)
        line.memory = window.memory
        line.subscriber = subscriber
        line.line.shared = <md_offers *>base
        line.line.cells = md_offers_cells(line.line.shared, self.pool.slots)
        line.line.offered = <md_offer *>calloc(depth, sizeof(md_offer))
        line.line.held = <md_offer *>calloc(loans, sizeof(md_offer))
        line.line.depth, line.line.loans = depth, loans
        line.line.policy, line.line.bell_fd = policy, bell_fd
        if line.line.offered == NULL or line.line.held == NULL:
            raise MemoryError("no memory for the books of a subscriber")
        line.line.shared.magic = MD_OFFERS_MAGIC
        self.lines.append(line)
        if md_pool_add(&self.pool, &line.line, latest) < 0:
            self.lines.pop()
            raise MemoryError("no memory for the books of a subscriber")
        return line

    def _refresh(self):
        """Look what the subscribers took, gave back and said. Tells whether some line ended."""
        self.ready()
        md_pool_refresh(&self.pool)
        return self.pool.events != 0

    def _end(self, StreamLine line not None, int reason, bint keep):
        """Be done with a subscriber; with `keep` it has what it holds until it gives that back."""
        if self.state == OPEN and self.forks == _forks and line in self.lines:
            md_line_refresh(&self.pool, &line.line)
            md_line_end(&self.pool, &line.line, reason, keep)

    def _gone(self):
        """Take those out that are gone: their lines."""
        cdef StreamLine line
        self.pool.events = 0
        gone = []
        for line in list(self.lines):
            if line.line.state == MD_LINE_GONE:
                md_pool_remove(&self.pool, &line.line)
                self.lines.remove(line)
                gone.append(line)
        return gone

    def _close(self):
        """Tell all subscribers that the stream has ended."""
        if self.state != OPEN:
            return
        if self.forks == _forks:
            for line in self.lines:
                md_line_farewell(&(<StreamLine>line).line)
        self.state = CLOSED
        self.pool.line_count = 0
        self.lines.clear()
        self.memory = self.arrays = None

    def _state(self):
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""
        return INHERITED if self.state == OPEN and self.forks != _forks else self.state

    def _lines(self):
        return list(self.lines or ())

    def _reserved(self, int policy, uint32_t depth, uint32_t loans):
        """Slots that must be left for the subscribers, with one more."""
        return md_pool_reserved(&self.pool, policy, depth, loans)

    def _counts(self):
        """published, discarded, bytes, free slots, loaned ones, the last sequence number."""
        return (self.pool.published, self.pool.discarded, self.pool.nbytes, self.pool.free_count,
                self.pool.loans, self.pool.sequence)

    def __reduce__(self):
        raise TypeError("a stream can not be pickled: it is of its process alone")


cdef enum:
    LOANED = 1
    PUBLISHED = 2
    DISCARDED = 3


@cython.final
@cython.no_gc_clear
@cython.nonecheck(True)  # LoanedSlot.__new__, which Python code can call, gives one of no stream
cdef class LoanedSlot:
    """A slot of a stream, to be filled in place; made by `Stream.loan`.

    Attributes
    ----------
    array : numpy.ndarray
        Its memory, in the stream's shape and dtype, else bytes; writable. It is the same object
        each time that this slot is loaned. Do not write to it after publishing: subscribers would
        see that.
    nbytes : int
        How many bytes subscribers get: at first all. May be set to fewer in a stream of bytes.
    metadata : object
        None, or what msgspec encodes as MessagePack: dicts, lists, strings, numbers, bytes.
    """

    cdef StreamPool stream
    cdef uint32_t index
    cdef int state
    cdef size_t nbytes_
    cdef object metadata_
    cdef bytes encoded

    def __init__(self):
        raise TypeError("made by Stream.loan()")

    def __dealloc__(self):
        if self.state == LOANED and self.stream.state == OPEN and self.stream.forks == _forks:
            md_pool_discard(&self.stream.pool, self.index)

    cdef int loaned(self) except -1:
        if self.state != LOANED:
            raise self.stream._not_loaned("published" if self.state == PUBLISHED else "discarded")
        self.stream.ready()
        return 0

    @property
    def array(self):
        self.loaned()
        array = self.stream.arrays[self.index]
        if array is None:
            array = self.stream.arrays[self.index] = self.stream.make_array(
                self.window(self.stream.slot_size))
        return array

    cdef Window window(self, size_t nbytes):
        return Window(self.stream.memory, self.stream.first + self.index * self.stream.stride,
                      nbytes, True)

    @property
    def address(self):
        """Of its first byte, in this task."""
        self.loaned()
        return self.stream.memory.address + self.stream.first + self.index * self.stream.stride

    @property
    def buffer(self):
        """Its memory as bytes: a writable memoryview of `nbytes` bytes."""
        self.loaned()
        return memoryview(self.window(self.nbytes_))

    @property
    def nbytes(self):
        return self.nbytes_

    @nbytes.setter
    def nbytes(self, value):
        self.loaned()
        self.nbytes_ = self.stream._check_nbytes(value)

    @property
    def metadata(self):
        return self.metadata_

    @metadata.setter
    def metadata(self, value):
        self.loaned()
        self.encoded = None if value is None else self.stream.encode(value)
        self.metadata_ = value

    def publish(self):
        """Offer it to all subscribers, with a sequence number and a timestamp. Never waits.

        Raises
        ------
        ClosedError
            It was published or discarded, or the stream was closed.
        """
        cdef const char *metadata = NULL
        cdef size_t length = 0
        cdef StreamPool stream = self.stream
        self.loaned()
        if self.encoded is not None:
            metadata = PyBytes_AsString(self.encoded)
            length = min(<size_t>PyObject_Size(self.encoded), stream.metadata_limit)
        self.state = PUBLISHED
        md_pool_publish(&stream.pool, self.index, self.nbytes_, metadata, length)
        if stream.pool.events:
            stream._tidy()

    def discard(self):
        """Give it back unpublished. Again, or after publishing, is a no-op."""
        if self.state == LOANED:
            self.state = DISCARDED
            if self.stream.state == OPEN and self.stream.forks == _forks:
                md_pool_discard(&self.stream.pool, self.index)

    def __enter__(self):
        self.loaned()
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.discard()
        elif self.state == LOANED:
            self.publish()

    def __reduce__(self):
        raise TypeError("a slot can not be pickled: for a copy of its bytes pickle bytes(slot.buffer)")

    def __repr__(self):
        state = {LOANED: "loaned", PUBLISHED: "published", DISCARDED: "discarded"}[self.state]
        return f"<LoanedSlot {self.index} of {self.stream!r}: {state}>"


# --- The subscriber -----------------------------------------------------------------------------


@cython.final
@cython.no_gc  # its one cycle, through `arrays`, is cut when the subscription is closed
cdef class _Taker:
    """One subscriber's end. It outlives the subscription while slots are held."""

    cdef md_taker taker
    cdef MappedMemory memory  # of the pool
    cdef MappedMemory offers
    cdef size_t first, stride
    cdef list memories, arrays  # of each slot, unless views of it are alive; None once closed
    cdef object make_array, decode, given_back
    cdef object lease  # called when nothing is held any more, once closed
    cdef uint64_t forks
    cdef int state
    cdef int inside    # threads that are in the memory without the GIL

    cdef void give(self, uint32_t index, uint64_t sequence) noexcept:
        if self.forks == _forks:
            md_taker_give(&self.taker, index, sequence)
            self.leave()

    cdef void leave(self) noexcept:
        """Closed, and the last slot given back: so is the rest."""
        cdef PyObject *kind
        cdef PyObject *value
        cdef PyObject *trace
        if self.state == OPEN or self.taker.holding or self.inside:
            return
        self.memory = self.offers = None
        lease, self.lease = self.lease, None
        if lease is not None:
            # Slots go while an exception unwinds the stack, too; no call succeeds under it.
            PyErr_Fetch(&kind, &value, &trace)
            lease()
            PyErr_Restore(kind, value, trace)

    cdef void close(self):
        if self.state != OPEN:
            return
        self.state = CLOSED
        self.memories = self.arrays = None
        if self.forks == _forks:
            md_taker_close(&self.taker)
            md_taker_stop(&self.taker)
        self.leave()


@cython.final
@cython.no_gc
@cython.nonecheck(True)  # as LoanedSlot
cdef class SlotMemory:
    """The bytes of one slot, as a subscriber sees them: what every view of them holds.

    `owed`: the sequence number with which the slot is given back when the last view goes.
    """

    cdef _Taker taker
    cdef uint32_t index
    cdef uint64_t owed
    cdef readonly Py_ssize_t exports

    def __init__(self):
        raise TypeError("made by StreamSubscriber")

    def __dealloc__(self):
        if self.owed:
            self.taker.give(self.index, self.owed)

    cdef int fill(self, Py_buffer *view, int flags, size_t nbytes) except -1:
        if self.taker.memory is None:
            raise BufferError("the subscription that this slot was of was closed")
        if flags & PyBUF_WRITABLE:
            raise BufferError("a slot is read-only to its subscribers")
        view.buf = <void *>(self.taker.memory.address + self.taker.first
                            + self.index * self.taker.stride)
        view.obj = self
        view.len = nbytes
        view.readonly = 1
        view.itemsize = 1
        view.format = BYTES if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self.exports += 1
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.fill(view, flags, self.taker.taker.slot_size)

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __reduce__(self):
        raise TypeError("a slot can not be pickled: for a copy of its bytes pickle bytes(slot)")


@cython.final
@cython.no_gc
@cython.nonecheck(True)  # as LoanedSlot
cdef class TakenSlot:
    """A slot that a subscriber has: read-only, and not filled again until it is given back.

    Given back by `release`, by leaving its ``with`` block, at the next turn of the loop that gave
    it (unless `keep` was called), or when it is dropped; in all of these but `release` once the
    last view of it is gone. It is a buffer itself.

    Attributes
    ----------
    sequence : int
        Counts what the stream published, from 1.
    timestamp : int
        Nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns`) when it was published.
    nbytes : int
        How many bytes were published.
    """

    cdef _Taker taker
    cdef SlotMemory memory
    cdef object array_      # made when first asked for, then kept with the slot
    cdef uint32_t index
    cdef bint mine, kept, decoded
    cdef readonly uint64_t sequence, timestamp
    cdef readonly Py_ssize_t nbytes
    cdef object metadata_   # encoded, until it is asked for

    def __init__(self):
        raise TypeError("made by Subscription.take()")

    def __dealloc__(self):
        self.let_go()

    cdef bint idle(self):
        """Whether no view of the slot is alive.

        A view of the array holds the array; a view of the memory is counted. The count is in the
        low half of what it shares with flags on later versions of CPython.
        """
        cdef uint32_t ours = 1
        if self.memory.exports:
            return False
        if self.array_ is None:
            return True
        if self.taker.state == OPEN and self.taker.arrays[self.index] is self.array_:
            ours = 2
        return <uint32_t>Py_REFCNT(<PyObject *>self.array_) == ours

    cdef void let_go(self) noexcept:
        cdef _Taker taker = self.taker
        if not self.mine:
            return
        self.mine = False
        if self.idle():
            taker.give(self.index, self.sequence)
        else:
            self.memory.owed = self.sequence
            if taker.state == OPEN:
                taker.memories[self.index] = taker.arrays[self.index] = None
        self.memory = None
        self.array_ = None

    cdef int check(self) except -1:
        if not self.mine:
            raise self.taker.given_back()
        return 0

    @property
    def array(self):
        """The slot as a read-only NumPy array: of the stream's shape and dtype, else of bytes."""
        self.check()
        if self.array_ is None and self.taker.state == OPEN:
            self.array_ = self.taker.arrays[self.index]
        if self.array_ is None:
            self.array_ = self.taker.make_array(self.memory)
            if self.taker.state == OPEN:
                self.taker.arrays[self.index] = self.array_
        if <size_t>self.nbytes != self.taker.taker.slot_size:
            return self.array_[:self.nbytes]
        return self.array_

    @property
    def address(self):
        """Of its first byte, in this task."""
        self.check()
        return self.taker.memory.address + self.taker.first + self.index * self.taker.stride

    @property
    def metadata(self):
        """What the publisher gave with it, as MessagePack has it; None where it gave nothing.

        Raises
        ------
        ProtocolError
            It is no MessagePack (EPROTO).
        """
        if not self.decoded:
            if self.metadata_ is not None:
                self.metadata_ = self.taker.decode(self.metadata_)
            self.decoded = True
        return self.metadata_

    @property
    def held(self):
        """Whether it was not given back, nor is about to be."""
        return self.mine

    def keep(self):
        """Have it stay past the next turn of the loop, until it is released or dropped."""
        self.check()
        self.kept = True

    def release(self):
        """Give it back now. Again is a no-op.

        Raises
        ------
        BufferError
            Views of it are alive (arrays, memoryviews): they would show later contents.
        """
        if self.mine and not self.idle():
            raise BufferError(
                f"slot {self.sequence} has live views, arrays or memoryviews: delete them first, "
                "or leave a with block instead")
        self.let_go()

    def _next_turn(self):
        if not self.kept:
            self.let_go()

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, *exc):
        self.let_go()

    def __len__(self):
        return self.nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.mine:
            raise BufferError("this slot was given back: its memory shows something else by now")
        self.memory.fill(view, flags, self.nbytes)

    def __releasebuffer__(self, Py_buffer *view):
        pass  # never called: views are of the memory; see Exporter

    def __reduce__(self):
        raise TypeError("a slot can not be pickled: for a copy of its bytes pickle bytes(slot)")

    def __repr__(self):
        state = "" if self.mine else ", given back"
        return f"<TakenSlot {self.sequence}: {self.nbytes:,} bytes{state}>"


@cython.no_gc_clear  # else the collector could take the end before __dealloc__ says goodbye
cdef class StreamSubscriber:
    """Base of `Subscription`: its fast half."""

    cdef _Taker of
    cdef bint listens
    cdef object __weakref__

    def __cinit__(self):
        self.of = _Taker.__new__(_Taker)

    def __dealloc__(self):
        self.of.close()

    def _begin(self, Window pool not None, Window offers not None, size_t header_size,
               uint32_t slots, size_t stride, size_t slot_size, uint32_t depth, uint32_t loans,
               make_array, decode, given_back, lease):
        """Once, before anything else: tell whether the memory is a subscriber's."""
        cdef _Taker of = self.of
        cdef size_t base = offers.memory.address + offers.offset
        cdef size_t room = <size_t>pool.nbytes
        if of.state:
            raise TypeError("a subscriber begins once")
        if (not offers.writable or base % 64 or not slots or not depth or not loans
                or header_size < C_HEADER_SIZE or header_size % 8 or slot_size > stride
                or stride > room // slots or header_size > (room - slots * stride) // slots
                or <size_t>offers.nbytes < md_offers_size(slots, depth)):
            raise ValueError("_begin: no memory for a subscriber")
        of.taker.shared = <md_offers *>base
        if of.taker.shared.magic != MD_OFFERS_MAGIC:
            return False
        of.taker.cells = md_offers_cells(of.taker.shared, slots)
        of.taker.headers = <unsigned char *><size_t>(pool.memory.address + pool.offset)
        of.taker.header_size = header_size
        of.taker.metadata_limit = header_size - C_HEADER_SIZE
        of.taker.slot_size = slot_size
        of.taker.slots, of.taker.depth, of.taker.loans = slots, depth, loans
        of.memory, of.offers = pool.memory, offers.memory
        of.first = pool.offset + room - slots * stride
        of.stride = stride
        of.memories = [None] * slots
        of.arrays = [None] * slots
        of.make_array, of.decode, of.given_back = make_array, decode, given_back
        of.lease = lease
        of.forks = _forks
        of.state = OPEN
        return True

    cdef int ready(self) except -1:
        if self.of.state != OPEN or self.of.forks != _forks:
            self._closed()
            raise SystemError("_closed() did not raise")
        return 0

    cdef TakenSlot find(self):
        """The next slot, or None where none is offered."""
        cdef _Taker of = self.of
        cdef md_taken taken
        cdef uint32_t ended
        cdef TakenSlot slot
        cdef int rc, attempt
        self.ready()
        memset(&taken, 0, sizeof(taken))
        if of.taker.holding >= of.taker.loans:
            self._too_many_loans()
        ended = md_taker_ended(&of.taker) or of.taker.gone  # first: what came before counts
        slot = TakenSlot.__new__(TakenSlot)  # before one is taken: it may fail
        rc = md_taker_take(&of.taker, &taken)
        if rc == 0 and self.listens and not ended:
            self._clear()
            self.ready()  # another thread may have closed it meanwhile
            md_taker_want(&of.taker)
            ended = md_taker_ended(&of.taker) or of.taker.gone
            rc = md_taker_take(&of.taker, &taken)
        for attempt in range(1000):
            if rc != -C_EAGAIN:
                break
            rc = md_taker_take(&of.taker, &taken)
        if rc == 1:
            slot.taker = of
            slot.index = taken.slot
            slot.sequence = taken.sequence
            slot.timestamp = taken.timestamp
            slot.nbytes = <Py_ssize_t>taken.nbytes
            slot.memory = <SlotMemory>PyList_GetItem(of.memories, taken.slot)
            slot.mine = True
            if slot.memory is None:
                slot.memory = of.memories[taken.slot] = SlotMemory.__new__(SlotMemory)
                slot.memory.taker = of
                slot.memory.index = taken.slot
            if taken.metadata:
                slot.metadata_ = PyBytes_FromStringAndSize(
                    <char *>of.taker.headers + taken.slot * of.taker.header_size + C_HEADER_SIZE,
                    <Py_ssize_t>taken.metadata)
            else:
                slot.decoded = True
            return slot
        if rc == 0 and ended:
            self._ended(md_taker_ended(&of.taker))
            raise SystemError("_ended() did not raise")
        if rc < 0:
            self._broke()
            raise SystemError("_broke() did not raise")
        return None

    def try_take(self):
        """Take the next slot, or give None where none is there.

        Raises
        ------
        PeerGoneError, ProtocolError, AllocationError, ClosedError
            As `take`.
        """
        return self.find()

    def take(self, timeout=None):
        """Take the next slot: the oldest that is offered.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for one; None waits for ever, 0 not at all.

        Returns
        -------
        TakenSlot

        Raises
        ------
        TimedOutError
            None came in time (ETIMEDOUT; EAGAIN where none was given).
        PeerGoneError
            All were taken, and the publisher closed the stream (EPIPE), has ended (ECONNRESET), or
            dropped this subscription since it was too slow (ECONNABORTED, policy DISCONNECT).
        ProtocolError
            The publisher wrote what can not be, or says so of us (EPROTO).
        AllocationError
            This subscription holds as many slots as it may (ENOBUFS): release some.
        ClosedError
            It was closed, or belongs to the parent of this forked process.

        Notes
        -----
        Threads: safe; several may take, each gets slots of its own.
        """
        return self.next(timeout)

    cdef TakenSlot next(self, timeout):
        cdef TakenSlot slot = self.find()
        cdef int turn
        if slot is None and (timeout is None or timeout):
            # Giving the GIL up and having it back takes as long as what is waited for here.
            for turn in range(SHORT_SPIN):
                if md_taker_pending(&self.of.taker):
                    slot = self.find()
                    break
                md_ring_pause()
        if slot is None:
            return self._take(timeout)
        return slot

    def __iter__(self):
        cdef SlotIterator slots = SlotIterator.__new__(SlotIterator)
        slots.subscriber = self
        return slots

    def _ready(self):
        """Whether something is offered; raises where nothing will be any more."""
        cdef uint32_t ended
        self.ready()
        ended = md_taker_ended(&self.of.taker) or self.of.taker.gone
        if self._pending():
            return True
        if ended:
            self._ended(md_taker_ended(&self.of.taker))
        return False

    def _sleep(self, uint64_t spin, uint64_t limit):
        """Wait until something is offered, or the publisher ends; False after `limit` ns."""
        cdef _Taker of = self.of
        cdef md_wait wait
        cdef int64_t pending
        self.ready()
        pending = md_taker_pending(&of.taker)
        if pending < 0:
            self._broke()
        if pending:
            return True
        wait.position = &of.taker.shared.written
        wait.wanted = &of.taker.shared.subscriber_wanted
        wait.bell = &of.taker.shared.bell
        wait.ended = &of.taker.shared.ended
        wait.gone = &of.taker.gone
        wait.sleeps = &of.taker.sleeps
        of.inside += 1
        try:
            # Not `written` as it is by now: then an offer put in just before would wake nobody.
            return bool(_sleep_on(&wait, of.taker.read + 1, spin, limit))
        finally:
            of.inside -= 1
            of.leave()

    def _pending(self):
        """How many slots are offered now."""
        cdef int64_t pending
        self.ready()
        pending = md_taker_pending(&self.of.taker)
        if pending < 0:
            self._broke()
        return pending

    def _listen(self):
        """From here on ask for a waking, after `_clear`, whenever nothing is found."""
        self.listens = True

    def _set_gone(self):
        """Have the publisher be known as ended."""
        if self.of.state == OPEN and self.of.forks == _forks:
            md_taker_stop(&self.of.taker)

    def _close(self):
        """Say that this end is done; slots that are held stay so."""
        self.of.close()

    def _state(self):
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""
        cdef _Taker of = self.of
        return INHERITED if of.state == OPEN and of.forks != _forks else of.state

    def _counts(self):
        """taken, missed, bytes, slots held, wakings of the publisher, sleeps, last sequence."""
        cdef md_taker *taker = &self.of.taker
        return (taker.taken, taker.missed, taker.nbytes, taker.holding, taker.rung, taker.sleeps,
                taker.sequence)

    def __reduce__(self):
        raise TypeError("a subscription can not be pickled: it is of its process alone")


@cython.final
cdef class SlotIterator:
    """Slot after slot: each goes back at the next turn, the last one with this; but for those kept.
    """

    cdef StreamSubscriber subscriber
    cdef TakenSlot slot

    def __init__(self):
        raise TypeError("made by iterating over a Subscription")

    def __dealloc__(self):
        self.leave()

    cdef void leave(self):
        slot, self.slot = self.slot, None
        if slot is not None and not slot.kept:
            slot.let_go()

    def __iter__(self):
        return self

    def __next__(self):
        if self.subscriber is None:
            raise StopIteration
        self.leave()
        try:
            self.slot = self.subscriber.next(None)
        except Exception as error:
            if not self.subscriber._is_end(error):
                raise
            self.subscriber = None
            raise StopIteration from None
        return self.slot
