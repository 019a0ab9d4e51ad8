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


# Who spins while another program wants the CPU gets it back only when that has had its turn, and
# hears later than a sleeper that is woken: so where it took long, the next waits do not spin.

cdef uint64_t LOST = 500000  # ns more than a spin should take: somebody else had the CPU
cdef int FEW = 16, MANY = 1024  # waits that do not spin after that

cdef struct Patience:
    int rest   # waits yet to come that do not spin
    int rests  # how many they were at first


cdef bint _may_spin(Patience *of):
    """Whether this wait spins."""
    if of.rest:
        of.rest -= 1
        return False
    return True


cdef void _spun(Patience *of, uint64_t began, uint64_t spin):
    """Learn from a spin that was to take so many ns at most."""
    if md_now() < began + spin + LOST:
        of.rests //= 2
    else:
        of.rests = min(max(2 * of.rests, FEW), MANY)
        of.rest = of.rests


cdef int _spin_and_sleep_on(const md_wait *wait, uint64_t wanted, uint64_t spin, uint64_t limit,
                            Patience *of) except -1:
    """As `_sleep_on`, but spin only as long as nobody else wants the CPU for long."""
    cdef uint64_t began
    cdef bint met
    spin = min(spin, limit)
    if spin and _may_spin(of):
        began = md_now()
        met = _sleep_on(wait, wanted, spin, spin)
        _spun(of, began, spin)
        if met or spin == limit:
            return met
        limit -= spin
    return _sleep_on(wait, wanted, 0, limit)
