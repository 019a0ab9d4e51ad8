# The two ends of a ring (ring.h) as Python objects; included by _native.pyx.
#
# Everything but a long copy and waiting runs under the GIL from its first line to its last: it is
# the lock of an end. During a long copy other threads wait for its end (`copying`); waiting
# touches nothing that they need. What is slow or goes wrong is left to the subclass.

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "ring.h" nogil:
    struct md_ring_side:
        uint64_t wanted
        uint64_t magic
    struct md_ring:
        md_ring_side *mine
        md_ring_side *theirs
        unsigned char *data
        uint64_t capacity
        uint64_t position
        uint64_t published
        uint64_t limit
        uint64_t entry
        int producer
        int broken
        int bell_fd
        uint64_t entries
        uint64_t bytes
        uint64_t rung
        uint64_t sleeps
    uint64_t MD_RING_MAGIC
    uint64_t MD_RING_NONE
    uint64_t MD_RING_HEADER
    uint64_t md_ring_extent(uint64_t)
    int md_ring_begin(md_ring *)
    int md_ring_look(md_ring *)
    int md_ring_ended(md_ring *)
    void md_ring_publish(md_ring *)
    void md_ring_listen(md_ring *)
    void md_ring_close(md_ring *)
    void md_ring_stop(md_ring *)
    int md_ring_room(md_ring *, uint64_t)
    unsigned char *md_ring_target(md_ring *)
    void md_ring_put(md_ring *, uint64_t)
    int md_ring_next(md_ring *)
    unsigned char *md_ring_source(md_ring *)
    void md_ring_drop(md_ring *)
    md_wait md_ring_wait(md_ring *)
    size_t C_POSITION "offsetof(struct md_ring_side, position)"
    size_t C_WANTED "offsetof(struct md_ring_side, wanted)"
    size_t C_BELL "offsetof(struct md_ring_side, bell)"
    size_t C_CLOSED "offsetof(struct md_ring_side, closed)"
    size_t C_MAGIC "offsetof(struct md_ring_side, magic)"
    size_t C_LISTENS "offsetof(struct md_ring_side, listens)"

RING_MAGIC = MD_RING_MAGIC
RING_OFFSETS = {"position": C_POSITION, "wanted": C_WANTED, "bell": C_BELL, "closed": C_CLOSED,
                "magic": C_MAGIC, "listens": C_LISTENS}


cdef enum:
    OPEN = 1
    CLOSED = 2
    INHERITED = 3

cdef Py_ssize_t LONG_COPY = 65536  # bytes; below, giving the GIL up costs more than the copy
cdef int SHORT_SPIN = 32  # turns, about a microsecond: a peer at work answers in less
cdef uint64_t LONG_SPIN = 10000000  # ns, after which signal handlers get to run


@cython.no_gc_clear  # else the collector could take the memory before __dealloc__ says goodbye
cdef class RingEnd:
    """One end of a ring; see `Producer` and `Consumer`."""

    cdef md_ring ring
    cdef MappedMemory memory
    cdef int state
    cdef int inside    # threads that are in the memory without the GIL
    cdef bint copying
    cdef bint listens  # a loop waits on a socket: ask for a waking whenever there is nothing
    cdef uint64_t waits
    cdef public uint64_t _spin  # ns
    cdef Patience patience
    cdef object __weakref__

    def __dealloc__(self):
        if self.state == OPEN:
            md_ring_close(&self.ring)

    def _begin(self, Window window not None, size_t page, size_t capacity, bint producer,
               int bell_fd):
        """Once, before anything else: tell whether the memory is a ring's; EPROTO as False."""
        cdef size_t base = window.memory.address + window.offset
        if self.state:
            raise TypeError("an end begins once")
        if (not window.writable or capacity % 8 or capacity < 16 or page < 64
                or <size_t>window.nbytes != 2 * page + 2 * capacity or base % 64):
            raise ValueError("_begin: no memory for a ring")
        self.ring.producer = producer
        self.ring.mine = <md_ring_side *>(base if producer else base + page)
        self.ring.theirs = <md_ring_side *>(base + page if producer else base)
        self.ring.data = <unsigned char *>(base + 2 * page)
        self.ring.capacity = capacity
        self.ring.bell_fd = bell_fd
        if (<md_ring_side *>base).magic != MD_RING_MAGIC or md_ring_begin(&self.ring) < 0:
            return False
        self.memory = window.memory
        self.state = OPEN
        return True

    cdef int ready(self) except -1:
        """Be alone in an open end."""
        while self.copying:
            with nogil:
                sched_yield()
        if self.state != OPEN:
            self._closed()
            raise SystemError("_closed() did not raise")
        return 0

    cdef int fail(self) except -1:
        self._broke()
        raise SystemError("_broke() did not raise")

    cdef int finish(self) except -1:
        self._ended()
        raise SystemError("_ended() did not raise")

    cdef int copy(self, void *to, const void *source, size_t length) except -1:
        if length < <size_t>LONG_COPY:
            memcpy(to, source, length)
            return 0
        self.copying = True
        self.inside += 1
        with nogil:
            memcpy(to, source, length)
        self.copying = False
        self.leave()
        return 0

    cdef void leave(self):
        self.inside -= 1
        if self.state != OPEN and not self.inside:
            self.memory = None

    cdef bint wait(self, uint64_t wanted, uint64_t spin, uint64_t limit) except -1:
        cdef md_wait on = md_ring_wait(&self.ring)
        self.inside += 1
        try:
            return _sleep_on(&on, wanted, spin, limit)
        finally:
            self.leave()

    cdef bint spin_until(self, uint64_t wanted, deadline) except -1:
        cdef md_wait on = md_ring_wait(&self.ring)
        cdef uint64_t left = self._spin
        cdef double seconds
        cdef int turn
        if deadline is not None:
            seconds = <double>deadline - <double>md_now() / 1e9
            if seconds <= 0:
                return False
            if seconds * 1e9 < <double>left:
                left = <uint64_t>(seconds * 1e9)
        self.waits += 1
        if not left:
            return False
        # Giving the GIL up and having it back takes as long as what is waited for here.
        for turn in range(SHORT_SPIN):
            if md_reached(&on, wanted):
                return True
            md_pause()
        return _may_spin(&self.patience) and self.spin_politely(wanted, left)

    cdef bint spin_politely(self, uint64_t wanted, uint64_t left) except -1:
        """Spin and let others run; but not the next times, where they want to run for long."""
        cdef uint64_t part, began = md_now(), spin = left
        cdef bint met = False
        while left and not met:
            part = left if left < LONG_SPIN else LONG_SPIN
            left -= part
            met = self.wait(wanted, part, part) or self.state != OPEN
        _spun(&self.patience, began, spin - left)
        return met

    def _spin_until(self, uint64_t wanted, deadline):
        """Wait without sleeping, for `_spin` ns; True: the other is at `wanted`, or look again."""
        self.ready()
        return self.spin_until(wanted, deadline)

    def _sleep(self, uint64_t wanted, uint64_t limit):
        """Wait until the other is at `wanted` or has ended; False after `limit` ns or a signal."""
        self.ready()
        return self.wait(wanted, 0, limit)

    def _want(self, uint64_t wanted):
        self.ready()
        md_want(&self.ring.mine.wanted, wanted)

    def _look(self):
        """(my position, the other's, whether it has ended), read now."""
        cdef bint ended
        self.ready()
        ended = md_ring_ended(&self.ring)
        if self.ring.broken or md_ring_look(&self.ring) < 0:
            self.fail()
        return self.ring.published, self.ring.limit, ended

    def _listen(self):
        """From here on ask for a waking, after `_clear`, whenever there is no entry, or no room."""
        self.ready()
        md_ring_listen(&self.ring)
        self.listens = True

    def _set_gone(self):
        """Have the other end be known as ended."""
        if self.state == OPEN:
            md_ring_stop(&self.ring)

    def _close(self):
        """Say that this end is done; its own waiters find it closed."""
        if self.state != OPEN:
            return
        md_ring_close(&self.ring)
        self.state = CLOSED
        md_ring_stop(&self.ring)
        if not self.inside:
            self.memory = None

    def _inherit(self):
        """In a fork child: from here on it is the parent's, and nothing changes any more."""
        self.state = INHERITED
        self.copying = False

    def _state(self):
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""
        return self.state

    def _counts(self):
        """entries, bytes, wakings of the other end, waits, sleeps."""
        return (self.ring.entries, self.ring.bytes, self.ring.rung, self.waits,
                self.ring.sleeps)

    def __reduce__(self):
        raise TypeError("an end of a queue can not be pickled: hand over its descriptor, and make "
                        "the other end of that")


cdef class RingProducer(RingEnd):
    """Base of `Producer`: its fast half."""

    cdef uint64_t wanted  # where the consumer has to be for the entry that found no room

    cdef int put(self, data) except -1:
        """Put an entry, not yet published: 1, or 0 where there is no room now."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len > self.ring.capacity - MD_RING_HEADER:
                self._too_large(view.len)
            self.ready()  # Python code may have given the buffer, and another thread closed it
            rc = md_ring_room(&self.ring, view.len)
            if rc < 0:
                self.fail()
            if rc == 0:
                if self.listens:
                    rc = self.ask(view.len)
                if rc == 0:
                    self.want_room(view.len)
                    return 0
            self.copy(md_ring_target(&self.ring), view.buf, view.len)
            if self.state == OPEN:  # not closed by another thread during a long copy
                md_ring_put(&self.ring, view.len)
            else:
                self.ready()
        finally:
            PyBuffer_Release(&view)
        return 1

    cdef int ask(self, uint64_t nbytes) except -1:
        """Ask for a waking when there is room; look again: 1, or 0.

        At once after that the entry is put: another thread may fill the room while Python runs.
        """
        cdef int rc = 0
        while rc == 0:
            self._clear()
            self.ready()  # another thread may have closed it meanwhile, or put something
            self.want_room(nbytes)
            md_want(&self.ring.mine.wanted, self.wanted)
            if md_ring_ended(&self.ring):
                self.finish()
            rc = md_ring_room(&self.ring, nbytes)
            if rc == 0:
                break
            if rc > 0:
                self._wake()  # what others wait for was written over, and perhaps told meanwhile
                self.ready()
                rc = md_ring_room(&self.ring, nbytes)
            if rc < 0:
                self.fail()
        return rc

    cdef void want_room(self, uint64_t nbytes):
        self.wanted = self.ring.position + md_ring_extent(nbytes) - self.ring.capacity

    cdef int begin_put(self) except -1:
        self.ready()
        if md_ring_ended(&self.ring):
            self.finish()
        return 0

    def try_enqueue(self, data):
        """Put one entry in if there is room now; tell whether.

        Raises
        ------
        RangeError, PeerGoneError, ProtocolError, ClosedError
            As `enqueue`.
        """
        self.begin_put()
        if not self.put(data):
            return False
        md_ring_publish(&self.ring)
        return True

    def enqueue(self, data, timeout=None):
        """Put one entry in: a copy of any contiguous buffer, also of no bytes.

        Parameters
        ----------
        data : buffer
        timeout : float, optional
            Seconds to wait for room; None waits for ever, 0 not at all.

        Raises
        ------
        TimedOutError
            There was no room in time (ETIMEDOUT; EAGAIN where none was given). Nothing was put.
        RangeError
            It is larger than `largest` (EMSGSIZE): no waiting would help.
        PeerGoneError
            The consumer closed its end (EPIPE) or has ended (ECONNRESET).
        ProtocolError
            The consumer wrote what can not be; the queue is of no use any more (EPROTO).
        ClosedError
            This end was closed, or belongs to the parent of this forked process.

        Notes
        -----
        I/O Kit: IODataQueue::enqueue, which answers false when full. Threads: safe.
        """
        self.begin_put()
        if not self.put(data):
            deadline = None if timeout is None else self._deadline(timeout)
            if not self.spin_until(self.wanted, deadline):
                self._enqueue(data, timeout, deadline)
                return
            self.begin_put()
            if not self.put(data):
                self._enqueue(data, timeout, deadline)
                return
        md_ring_publish(&self.ring)

    def _put_many(self, list entries not None, Py_ssize_t start):
        """Put entries from the number `start` on, as many as fit, published in a few steps."""
        cdef Py_ssize_t count = PyObject_Size(entries), index = start
        self.begin_put()
        try:
            while index < count and self.put(entries[index]):
                index += 1
                # Else a batch as large as the queue would have both sides take turns.
                if self.ring.position - self.ring.published >= self.ring.capacity // 8:
                    md_ring_publish(&self.ring)
        finally:
            if self.state == OPEN:
                md_ring_publish(&self.ring)
        return index - start


cdef class RingConsumer(RingEnd):
    """Base of `Consumer`: its fast half."""

    cdef Window window  # on the entry that peek() shows; None where it shows none
    cdef object view    # the last view of it that was given

    cdef int begin_take(self) except -1:
        """Find an entry: 1, or 0 where the queue is empty.

        Who calls it takes the entry at once: no code in Python runs between, as then another
        thread may take it.
        """
        cdef bint ended
        cdef int rc
        while True:
            self.ready()
            if self.window is not None:
                self._forget()
            ended = md_ring_ended(&self.ring)  # before looking: what came before the end counts
            rc = md_ring_next(&self.ring)
            if rc != 0 or ended or not self.listens:
                break
            self._clear()
            self.ready()
            md_want(&self.ring.mine.wanted, self.ring.position + 8)
            if not md_ring_ended(&self.ring) and md_ring_next(&self.ring) == 0:
                break
            self._wake()  # that it came was told meanwhile, perhaps, and cleared
        if rc < 0:
            self.fail()
        if rc == 0 and ended:
            self.finish()
        return rc

    cdef bytes take(self):
        """A copy of the entry that was found."""
        cdef Py_ssize_t size = <Py_ssize_t>self.ring.entry
        cdef bytes data
        if size < LONG_COPY:
            return PyBytes_FromStringAndSize(<char *>md_ring_source(&self.ring), size)
        data = PyBytes_FromStringAndSize(NULL, size)
        self.copy(PyBytes_AsString(data), md_ring_source(&self.ring), size)
        self.ready()
        return data

    def try_dequeue(self):
        """Take the next entry out, or give None where the queue is empty.

        Raises
        ------
        PeerGoneError, ProtocolError, ClosedError, BufferError
            As `dequeue`.
        """
        cdef bytes data
        if not self.begin_take():
            return None
        data = self.take()
        md_ring_drop(&self.ring)
        md_ring_publish(&self.ring)
        return data

    def dequeue(self, timeout=None):
        """Take the next entry out, as a copy.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for one; None waits for ever, 0 not at all.

        Raises
        ------
        TimedOutError
            None came in time (ETIMEDOUT; EAGAIN where none was given).
        PeerGoneError
            All entries were taken, and the producer closed its end (EPIPE) or has ended
            (ECONNRESET).
        ProtocolError
            The producer wrote what can not be; the queue is of no use any more (EPROTO).
        ClosedError
            This end was closed, or belongs to the parent of this forked process.
        BufferError
            Views of the entry that `peek` showed are alive; it stays.

        Notes
        -----
        I/O Kit: IODataQueueDequeue, and IODataQueueWaitForAvailableData. Threads: safe.
        """
        cdef bytes data
        if not self.begin_take():
            deadline = None if timeout is None else self._deadline(timeout)
            if not (self.spin_until(self.ring.position + 1, deadline) and self.begin_take()):
                return self._dequeue(timeout, deadline)
        data = self.take()
        md_ring_drop(&self.ring)
        md_ring_publish(&self.ring)
        return data

    def _take_into(self, buffer):
        """Copy the next entry out: its size; None where the queue is empty."""
        cdef Py_buffer view
        cdef Py_ssize_t size
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)  # may run Python code
        try:
            if not self.begin_take():
                return None
            size = <Py_ssize_t>self.ring.entry
            if view.len < size:
                self._too_small(size, view.len)
            self.copy(view.buf, md_ring_source(&self.ring), size)
            self.ready()
        finally:
            PyBuffer_Release(&view)
        md_ring_drop(&self.ring)
        md_ring_publish(&self.ring)
        return size

    def _take_many(self, Py_ssize_t most):
        """Up to `most` entries that are there now, given back to the producer in one step."""
        cdef list taken = []
        cdef uint64_t entries = self.ring.entries, nbytes = self.ring.bytes
        cdef int rc = self.begin_take()
        try:
            while rc == 1 and most > 0:
                taken.append(self.take())
                md_ring_drop(&self.ring)
                most -= 1
                rc = md_ring_next(&self.ring) if most else 0
        except BaseException:
            self.ring.position = self.ring.published
            self.ring.entry = MD_RING_NONE
            self.ring.entries, self.ring.bytes = entries, nbytes
            raise
        # An entry that can not be, behind good ones: those are given, the next call fails.
        if self.state == OPEN:
            md_ring_publish(&self.ring)
        return taken

    def _view(self):
        """The next entry in place, read-only; None where the queue is empty."""
        cdef size_t at
        self.ready()
        if self.window is None:
            if not self.begin_take():
                return None
            at = <size_t>md_ring_source(&self.ring) - self.memory.address
            self.window = Window(self.memory, at, self.ring.entry, False)
        elif self.view is not None:
            try:
                self.view.nbytes
                return self.view
            except ValueError:  # its user released it
                pass
        self.view = memoryview(self.window)
        return self.view

    def release(self):
        """Be done with the entry that `peek` showed: its room goes back to the producer.

        Raises
        ------
        BufferError
            Views of it are alive (slices, NumPy arrays): they would show later entries.
        InvalidArgument
            `peek` showed none.
        """
        self.ready()
        if self.window is None:
            self._nothing_shown()
        self._forget()
        md_ring_drop(&self.ring)
        md_ring_publish(&self.ring)

    def _forget(self):
        """End the view that `peek` gave; its entry stays."""
        if self.view is not None:
            self.view.release()
            self.view = None
        if self.window is not None and self.window.exports:
            raise BufferError("views of the entry that peek() showed are alive, slices or arrays: "
                              "delete them first; they would show later entries")
        self.window = None

