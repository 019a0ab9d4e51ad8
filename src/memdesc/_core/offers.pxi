# What both ends of a stream need of offers.h; included by _native.pyx, before them.
#
# offers_publisher.pxi: the pool, and slots being filled. offers_taken.pxi: slots as a subscriber
# has them. offers_subscriber.pxi: taking them, and iterating. In all of them everything but waiting
# runs under the GIL from its first line to its last: it is the lock of an end. What is slow or goes
# wrong is left to the subclass.

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
        uint64_t dropped
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
    md_wait md_line_wait(md_line *)
    void md_line_refresh(md_pool *, md_line *)
    void md_line_end(md_pool *, md_line *, int, int)
    void md_line_farewell(md_line *)
    md_wait md_taker_wait(md_taker *)
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


cdef object _slot_noter = None


def note_slots(noter):
    """Have `noter(slot, end)` called with each slot that is loaned or taken; None: nobody.

    Of a taken one with its `SlotMemory`, which is there as long as the slot is held.
    """
    global _slot_noter
    _slot_noter = noter


def note_fork():
    """In a fork child: the ends of streams that it inherited are the parent's."""
    global _forks
    _forks += 1
