# Sleeping until another task is so far (waking.h); included by _native.pyx before ring and offers.

from cpython.exc cimport PyErr_CheckSignals

cdef extern from "errno.h":
    enum:
        C_EINTR "EINTR"
        C_ETIMEDOUT "ETIMEDOUT"

cdef extern from "waking.h" nogil:
    struct md_wait:
        pass
    uint64_t md_now()
    void md_pause()
    void md_want(void *, uint64_t)
    int md_reached(const md_wait *, uint64_t)
    int md_sleep(const md_wait *, uint64_t, uint64_t, uint64_t)


cdef int _sleep_on(const md_wait *wait, uint64_t wanted, uint64_t spin, uint64_t limit) except -1:
    """1: look again; 0: the time ran out, or a signal came, whose handlers have run."""
    cdef int rc
    with nogil:
        rc = md_sleep(wait, wanted, spin, limit)
    PyErr_CheckSignals()
    if rc < 0 and rc != -C_EINTR and rc != -C_ETIMEDOUT:
        _check(rc, "futex")
    return rc == 0
