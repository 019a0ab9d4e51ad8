# The subscriber's end of a stream: taking slots, waiting for them, iterating over them.


@cython.no_gc_clear  # else the collector could take the end before __dealloc__ says goodbye
cdef class StreamSubscriber:
    """Base of `Subscription`: its fast half."""

    cdef _Taker of
    cdef bint listens
    cdef Patience patience
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
        cdef bint told = False
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
            told = rc == 1
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
            slot.memory.taken = True
            if taken.metadata:
                slot.metadata_ = PyBytes_FromStringAndSize(
                    <char *>of.taker.headers + taken.slot * of.taker.header_size + C_HEADER_SIZE,
                    <Py_ssize_t>taken.metadata)
            else:
                slot.decoded = True
            if told:  # perhaps, that it came, and was cleared
                self._wake()
            if _slot_noter is not None:
                _slot_noter(slot.memory, self)
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
                md_pause()
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
        wait = md_taker_wait(&of.taker)
        of.inside += 1
        try:
            # Not `written` as it is by now: then an offer put in just before would wake nobody.
            return bool(_spin_and_sleep_on(&wait, of.taker.read + 1, spin, limit,
                                           &self.patience))
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
