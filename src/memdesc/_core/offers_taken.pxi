# What a subscriber holds of a stream: slots, and the memory behind every view of them.


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
    cdef bint taken
    cdef readonly Py_ssize_t exports
    cdef object __weakref__

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

    @property
    def held(self):
        """Whether the slot is held: by its handle, or by views of it."""
        return self.taken and self.taker.forks == _forks

    @property
    def address(self):
        """Of its first byte, in this task; 0 where the subscription was closed."""
        if self.taker.memory is None:
            return 0
        return self.taker.memory.address + self.taker.first + self.index * self.taker.stride

    @property
    def nbytes(self):
        return self.taker.taker.slot_size

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
            self.memory.taken = False
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
            array = self.taker.make_array(self.memory)
            self.check()  # another thread may have given it back meanwhile: then nothing holds it
            self.array_ = array
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
