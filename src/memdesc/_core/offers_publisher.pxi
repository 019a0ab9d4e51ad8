# The publisher's end of a stream: its subscribers' lines, the pool, and slots being filled.


@cython.final
@cython.no_gc_clear
cdef class StreamLine:
    """What the publisher knows of one subscriber; made by `StreamPool._add`."""

    cdef md_line line
    cdef MappedMemory memory
    cdef readonly object subscriber  # the subclass's record
    cdef Patience patience
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
        wait = md_line_wait(&self.line)
        return bool(_spin_and_sleep_on(&wait, wanted, spin, limit, &self.patience))


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
        if _slot_noter is not None:
            _slot_noter(slot, self)
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
                md_pause()
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
        """published, discarded, dropped, bytes, free slots, loaned ones."""
        return (self.pool.published, self.pool.discarded, self.pool.dropped, self.pool.nbytes,
                self.pool.free_count, self.pool.loans)

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
    held : bool
        Whether it is still to be published or discarded.
    metadata : object
        None, or what msgspec encodes as MessagePack: dicts, lists, strings, numbers, bytes.
    """

    cdef StreamPool stream
    cdef uint32_t index
    cdef int state
    cdef size_t nbytes_
    cdef object metadata_
    cdef bytes encoded
    cdef object __weakref__

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
    def held(self):
        return (self.state == LOANED and self.stream.state == OPEN
                and self.stream.forks == _forks)

    @property
    def array(self):
        self.loaned()
        array = self.stream.arrays[self.index]
        if array is None:
            array = self.stream.make_array(self.window(self.stream.slot_size))
            self.loaned()  # another thread may have closed the stream meanwhile
            self.stream.arrays[self.index] = array
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
