# Snapshots: mappings moved over one another, words copied whole. Included by _native.pyx.

cdef extern from "snapshot.h" nogil:
    long md_move(uintptr_t, size_t, uintptr_t)
    void md_copy_words(unsigned char *, const unsigned char *, size_t)
    long md_watch_stores(uintptr_t, size_t)
    long md_exchange(int, uintptr_t, size_t, uintptr_t, size_t)


cdef _check_move(MappedMemory source, size_t at, size_t length, MappedMemory target, size_t to):
    if at > source.length or length > source.length - at:
        raise ValueError("a move from outside of the source")
    if to > target.length or length > target.length - to:
        raise ValueError("a move to outside of the target")


cdef _moved(MappedMemory source, size_t at, size_t length):
    """What was moved is no longer the source's; what lay before it goes, the rest stays its own."""
    if at:
        with nogil:
            md_munmap(source.address, at)
    source.address += at + length
    source.length -= at + length


def move_memory(MappedMemory source not None, size_t at, size_t length,
                MappedMemory target not None, size_t to):
    cdef long rc
    _check_move(source, at, length, target, to)
    with nogil:
        rc = md_move(source.address + at, length, target.address + to)
    _check(rc, "mremap")
    _moved(source, at, length)


def exchange_memory(int watch, MappedMemory source not None, size_t at, size_t length,
                    MappedMemory target not None, size_t to, size_t nbytes):
    cdef long rc
    _check_move(source, at, length, target, to)
    if nbytes > length:
        raise ValueError("exchange_memory: more bytes than are moved")
    with nogil:
        rc = md_exchange(watch, source.address + at, length, target.address + to, nbytes)
    _check(rc, "mremap")
    _moved(source, at, length)


def watch_stores(size_t address, size_t length):
    cdef long rc
    with nogil:
        rc = md_watch_stores(address, length)
    return _check(rc, "userfaultfd")


def copy_words(target, source):
    """Copy `source` over `target`, two contiguous buffers of one size, word by word."""
    cdef Py_buffer into, of
    PyObject_GetBuffer(target, &into, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(source, &of, PyBUF_SIMPLE)
        try:
            if into.len != of.len:
                raise ValueError(f"copy_words: {of.len} bytes into {into.len}")
            with nogil:
                md_copy_words(<unsigned char *>into.buf, <const unsigned char *>of.buf, of.len)
        finally:
            PyBuffer_Release(&of)
    finally:
        PyBuffer_Release(&into)
