# cython: language_level=3, binding=False, embedsignature=True
# cython: freethreading_compatible=True, boundscheck=False, embedsignature.format=clinic
# cython: auto_pickle=False
# A copy of what owns a mapping would unmap it once more.
"""The compiled core: system calls and the exporters of memory. It decides nothing.

Everything takes integers and buffers. Every failure is an `OSError` whose errno is the
kernel's and whose text begins with the call's name. What can take long runs without the
GIL. The typed list of what is here is `_native.pyi`; a test holds this file to it.
"""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE
from cpython.buffer cimport PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Fetch, PyErr_Restore
from cpython.object cimport PyObject_Size
from cpython.ref cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport UINT32_MAX, UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset, strerror

cdef extern from "syscalls.h" nogil:
    long md_mmap(uintptr_t, size_t, int, int, int, int64_t)
    long md_munmap(uintptr_t, size_t)
    long md_mprotect(uintptr_t, size_t, int)
    long md_madvise(uintptr_t, size_t, int)
    long md_mlock(uintptr_t, size_t)
    long md_munlock(uintptr_t, size_t)
    long md_mincore(uintptr_t, size_t, unsigned char *)
    long md_duplicate(uintptr_t, size_t)
    long md_page_size()
    long md_process_vm_readv(int, void *, size_t, uintptr_t)
    long md_process_vm_writev(int, void *, size_t, uintptr_t)
    long md_pidfd_getfd(int, int)
    long md_stat_cached(int, const char *, uint64_t *)
    long md_fallocate(int, int, int64_t, int64_t)
    long md_name(uintptr_t, size_t, const char *)
    enum:
        C_PROT_NONE "PROT_NONE"
        C_PROT_READ "PROT_READ"
        C_PROT_WRITE "PROT_WRITE"
        C_MAP_SHARED "MAP_SHARED"
        C_MAP_PRIVATE "MAP_PRIVATE"
        C_MAP_ANONYMOUS "MAP_ANONYMOUS"
        C_MAP_FIXED "MAP_FIXED"
        C_MAP_FIXED_NOREPLACE "MAP_FIXED_NOREPLACE"
        C_MAP_NORESERVE "MAP_NORESERVE"
        C_MADV_COLLAPSE "MADV_COLLAPSE"
        C_MADV_HUGEPAGE "MADV_HUGEPAGE"
        C_MADV_NOHUGEPAGE "MADV_NOHUGEPAGE"
        C_MADV_POPULATE_READ "MADV_POPULATE_READ"
        C_MADV_POPULATE_WRITE "MADV_POPULATE_WRITE"
        C_MADV_DONTDUMP "MADV_DONTDUMP"
        C_MADV_DONTFORK "MADV_DONTFORK"

PROT_NONE = C_PROT_NONE
PROT_READ = C_PROT_READ
PROT_WRITE = C_PROT_WRITE
MAP_SHARED = C_MAP_SHARED
MAP_PRIVATE = C_MAP_PRIVATE
MAP_ANONYMOUS = C_MAP_ANONYMOUS
MAP_FIXED_NOREPLACE = C_MAP_FIXED_NOREPLACE
MADV_COLLAPSE = C_MADV_COLLAPSE
MADV_HUGEPAGE = C_MADV_HUGEPAGE
MADV_NOHUGEPAGE = C_MADV_NOHUGEPAGE
MADV_POPULATE_READ = C_MADV_POPULATE_READ
MADV_POPULATE_WRITE = C_MADV_POPULATE_WRITE
MADV_DONTDUMP = C_MADV_DONTDUMP
MADV_DONTFORK = C_MADV_DONTFORK

# linux/fcntl.h and linux/memfd.h: absent from the standard library before 3.13.
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_WRITE = 0x0008
F_SEAL_FUTURE_WRITE = 0x0010
F_SEAL_EXEC = 0x0020
MFD_NOEXEC_SEAL = 0x0008


cdef long _check(long rc, str call) except -1:
    """Give back a result, or raise what the kernel said, with the name of the call."""
    if rc < 0:
        raise OSError(-rc, f"{call}: {(<bytes>strerror(<int>-rc)).decode()}")
    return rc


@cython.final
@cython.no_gc_clear  # else the collector could take the heir first
cdef class MappedMemory:
    """One range of this task's addresses, unmapped when the last holder lets go of it.

    It can not be taken from under a view: a `Window` holds it, and views hold the window.
    """

    cdef object __weakref__  # what lies in it is found by it, as long as it lives
    cdef readonly unsigned long address
    cdef readonly unsigned long length
    cdef object _heir

    def __init__(self):
        raise TypeError("made by map_memory(), reserve_memory() or duplicate_memory()")

    def leave_to(self, heir):
        """Have `heir` called with a new owner of the range in place of unmapping it.

        Called once more where it raises.
        """
        self._heir = heir

    def __dealloc__(self):
        heir, length = self._heir, self.length
        if length and heir is not None:
            self.length = 0
            memory = _owned(self.address, length)
            try:
                heir(memory)
            except BaseException:  # an interrupt: the heir takes it all the same
                heir(memory)
                raise
        # munmap of populated memory takes 0.1 us a page: do not hold up other threads.
        elif length:
            with nogil:
                md_munmap(self.address, self.length)


cdef MappedMemory _owned(long address, size_t length):
    cdef MappedMemory memory = MappedMemory.__new__(MappedMemory)
    memory.address = <unsigned long>address
    memory.length = length
    return memory


def map_memory(size_t address, size_t length, int prot, int flags, int fd, long offset):
    cdef long rc
    with nogil:
        rc = md_mmap(address, length, prot, flags, fd, offset)
    _check(rc, "mmap")
    return _owned(rc, length)


def reserve_memory(size_t length):
    cdef long rc
    with nogil:
        rc = md_mmap(0, length, C_PROT_NONE, C_MAP_PRIVATE | C_MAP_ANONYMOUS | C_MAP_NORESERVE, -1, 0)
    _check(rc, "mmap")
    return _owned(rc, length)


def place_memory(MappedMemory memory not None, size_t at, size_t length, int prot, int flags,
                 int fd, long offset):
    cdef long rc
    if at > memory.length or length > memory.length - at:
        raise ValueError("place_memory: outside the reserved range")
    with nogil:
        rc = md_mmap(memory.address + at, length, prot, flags | C_MAP_FIXED, fd, offset)
    _check(rc, "mmap")


def duplicate_memory(size_t address, size_t length):
    cdef long rc
    with nogil:
        rc = md_duplicate(address, length)
    _check(rc, "mremap")
    return _owned(rc, length)


cdef char *BYTES = "B"  # unsigned bytes, in the notation of the struct module


@cython.final
@cython.no_gc_clear  # else the collector could take the memory from under a view in its garbage
cdef class Window:
    """The bytes of some mapped memory that Python may see: the one exporter of buffers.

    Counts its views. Holds its memory, so that no view can outlive the pages under it.
    """

    cdef readonly MappedMemory memory
    cdef readonly unsigned long offset
    cdef readonly Py_ssize_t nbytes
    cdef readonly bint writable
    cdef readonly Py_ssize_t exports

    # Not __init__, which could be called again under the views, or not at all.
    def __cinit__(self, MappedMemory memory not None, size_t offset, size_t nbytes, bint writable):
        if offset > memory.length or nbytes > memory.length - offset:
            raise ValueError("Window: outside the mapped range")
        self.memory = memory
        self.offset = offset
        self.nbytes = nbytes
        self.writable = writable

    @property
    def address(self):
        return self.memory.address + self.offset

    cdef int _fill(self, Py_buffer *view, int flags) except -1:
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("this memory is read-only")
        view.buf = <void *><size_t>(self.memory.address + self.offset)
        view.obj = self
        view.len = self.nbytes
        view.readonly = not self.writable
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
        self._fill(view, flags)

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __len__(self):
        return self.nbytes


cdef class Exporter:
    """Base of every class that gives the buffer protocol: its views are its window's.

    A subclass answers `_export()` with a `Window` (or, over memory that some Python object
    owns, with a memoryview of that object), or raises. The answer, not the subclass, is what
    the views keep alive, so dropping or closing the subclass never touches a view.
    """

    cdef object __weakref__

    def __getbuffer__(self, Py_buffer *view, int flags):
        source = self._export()
        if isinstance(source, Window):
            (<Window>source)._fill(view, flags)
        else:
            PyObject_GetBuffer(source, view, flags)

    def __releasebuffer__(self, Py_buffer *view):
        # Never called: a view is released by its `obj`, a window. But NumPy's frombuffer holds on
        # to the view only if the type has this; without it arrays would hold the subclass alone.
        pass

    def __reduce__(self):
        raise TypeError(
            f"{type(self).__name__} can not be pickled: memory travels through multiprocessing, "
            "a Service, send_descriptor, or Dask's client.scatter; for a copy of its bytes pickle "
            "read_bytes()"
        )


def mprotect(size_t address, size_t length, int prot):
    cdef long rc
    with nogil:
        rc = md_mprotect(address, length, prot)
    _check(rc, "mprotect")


def madvise(size_t address, size_t length, int advice):
    cdef long rc
    with nogil:
        rc = md_madvise(address, length, advice)
    _check(rc, "madvise")


def mlock(size_t address, size_t length):
    cdef long rc
    with nogil:
        rc = md_mlock(address, length)
    _check(rc, "mlock")


def munlock(size_t address, size_t length):
    cdef long rc
    with nogil:
        rc = md_munlock(address, length)
    _check(rc, "munlock")


def mincore(size_t address, size_t length):
    cdef long rc
    cdef size_t page_size = <size_t>md_page_size()  # the kernel's, as it writes one byte a page
    cdef bytes pages = PyBytes_FromStringAndSize(NULL, (length + page_size - 1) // page_size)
    cdef unsigned char *at = <unsigned char *>PyBytes_AsString(pages)
    with nogil:
        rc = md_mincore(address, length, at)
    _check(rc, "mincore")
    return pages


def process_vm_readv(int pid, buffer, size_t address):
    cdef Py_buffer view
    cdef long rc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        with nogil:
            rc = md_process_vm_readv(pid, view.buf, view.len, address)
    finally:
        PyBuffer_Release(&view)
    return _check(rc, "process_vm_readv")


def process_vm_writev(int pid, buffer, size_t address):
    cdef Py_buffer view
    cdef long rc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            rc = md_process_vm_writev(pid, view.buf, view.len, address)
    finally:
        PyBuffer_Release(&view)
    return _check(rc, "process_vm_writev")


def pidfd_getfd(int pidfd, int fd):
    cdef long rc
    with nogil:
        rc = md_pidfd_getfd(pidfd, fd)
    return _check(rc, "pidfd_getfd")


def stat_cached(int fd, bytes path not None):
    cdef const char *name = PyBytes_AsString(path)
    cdef uint64_t told[5]
    cdef long rc
    with nogil:
        rc = md_stat_cached(fd, name, told)
    _check(rc, "statx")
    return told[0], told[1], told[2], told[3], told[4]


def fallocate(int fd, int mode, long offset, long length):
    cdef long rc
    with nogil:
        rc = md_fallocate(fd, mode, offset, length)
    _check(rc, "fallocate")


def name_memory(size_t address, size_t length, bytes name not None):
    cdef const char *text = PyBytes_AsString(name)
    cdef long rc
    with nogil:
        rc = md_name(address, length, text)
    _check(rc, "prctl")


def copy_memory(target, source):
    """Copy `source` over `target`, two contiguous buffers of one size, without the GIL."""
    cdef Py_buffer into, of
    PyObject_GetBuffer(target, &into, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(source, &of, PyBUF_SIMPLE)
        try:
            if into.len != of.len:
                raise ValueError(f"copy_memory: {of.len} bytes into {into.len}")
            with nogil:
                memmove(into.buf, of.buf, of.len)
        finally:
            PyBuffer_Release(&of)
    finally:
        PyBuffer_Release(&into)


def zero_memory(MappedMemory memory not None, size_t at, size_t length):
    if at > memory.length or length > memory.length - at:
        raise ValueError("zero_memory: outside the mapped range")
    with nogil:
        memset(<void *>(memory.address + at), 0, length)


def buffer_address(buffer):
    """Where a contiguous buffer lies: (address, nbytes, readonly)."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        return <size_t>view.buf, view.len, bool(view.readonly)
    finally:
        PyBuffer_Release(&view)


@cython.final
cdef class Attempt:
    """A context that takes a lock where that needs no waiting, and tells whether it did.

    No signal handler runs between taking it and being inside: an interrupt after
    `lock.acquire(blocking=False)` would leave it locked for good.
    """

    cdef object lock
    cdef bint taken

    def __cinit__(self, lock):
        self.lock = lock

    def __enter__(self):
        self.taken = self.lock.acquire(False)
        return bool(self.taken)

    def __exit__(self, *exc):
        if self.taken:
            self.taken = False
            self.lock.release()


include "zone.pxi"
include "snapshot.pxi"
include "waking.pxi"
include "ring.pxi"
include "offers.pxi"
include "offers_publisher.pxi"
include "offers_taken.pxi"
include "offers_subscriber.pxi"
include "uring.pxi"
