# An io_uring (uring.h) as a Python object; included by _native.pyx.
#
# Preparing and reaping run under the GIL, which is their lock. Entering the kernel does not: other
# threads may prepare and reap meanwhile. What a signal cut short runs its handler here: raising an
# OSError runs Python code for its traceback (in a limited-API module), which would run the handler
# and swallow what that raises.

from posix.unistd cimport getpid

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "uring.h" nogil:
    struct md_sqe:
        unsigned char opcode
        unsigned char flags
        int fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint64_t user_data
        unsigned short buf_index
    struct md_cqe:
        uint64_t user_data
        int res
    struct md_uring:
        int fd
        uint32_t features
        uint32_t entries
        uint32_t completions
        uint64_t in_flight
    int MD_OP_READ_FIXED, MD_OP_WRITE_FIXED, MD_OP_READ, MD_OP_WRITE, MD_OP_ASYNC_CANCEL
    uint32_t MD_REGISTER_FILES, MD_REGISTER_EVENTFD, MD_UNREGISTER_EVENTFD
    int md_uring_open(md_uring *, uint32_t, uint32_t, uint32_t)
    void md_uring_close(md_uring *)
    void md_uring_drain(md_uring *)
    void md_uring_forget_files(md_uring *)
    uint32_t md_uring_pending(md_uring *)
    int md_uring_put(md_uring *, md_sqe *)
    int md_uring_take(md_uring *, md_cqe *)
    int md_uring_enter(md_uring *, uint32_t, int64_t)
    int md_uring_register(int, uint32_t, void *, uint32_t)
    int md_uring_buffers(int, iovec *, uint32_t)
    int md_uring_buffer(int, uint32_t, uintptr_t, size_t)
    int md_dio_alignment(int, uint32_t *, uint32_t *)
    long md_pread(int, uintptr_t, size_t, int64_t)
    long md_pwrite(int, uintptr_t, size_t, int64_t)

# linux/io_uring.h; Linux 5.19: completions do not interrupt a thread that is in user space.
URING_COOP_TASKRUN = 1 << 8
# Of an entry: the file is one of the registered; let a worker wait for it, not who submits.
URING_FIXED_FILE = 1 << 0
URING_ASYNC = 1 << 4


@cython.final
@cython.no_gc_clear
cdef class Uring:
    """One io_uring of this process. Who prepares an entry keeps its memory until it is reaped."""

    cdef md_uring ring
    cdef int pid
    cdef object __weakref__

    def __init__(self):
        raise TypeError("made by open_uring()")

    def __dealloc__(self):
        if self.pid and self.ring.fd >= 0:
            with nogil:
                if self.pid == getpid():
                    md_uring_drain(&self.ring)
                    md_uring_forget_files(&self.ring)
                md_uring_close(&self.ring)

    cdef int check(self) except -1:
        if self.ring.fd < 0 or not self.pid:  # not even made
            raise ValueError("the io_uring was closed")
        return 0

    @property
    def entries(self):
        return self.ring.entries

    @property
    def in_flight(self):
        return self.ring.in_flight

    @property
    def pending(self):
        self.check()
        return md_uring_pending(&self.ring)

    @property
    def closed(self):
        return self.ring.fd < 0

    def prepare(self, bint write, int file, unsigned char flags, size_t address, uint32_t length,
                uint64_t offset, uint64_t tag, int buffer):
        cdef md_sqe entry
        self.check()
        memset(&entry, 0, sizeof(md_sqe))
        if buffer < 0:
            entry.opcode = MD_OP_WRITE if write else MD_OP_READ
        else:
            entry.opcode = MD_OP_WRITE_FIXED if write else MD_OP_READ_FIXED
            entry.buf_index = <unsigned short>buffer
        entry.fd = file
        entry.flags = flags
        entry.addr = address
        entry.len = length
        entry.off = offset
        entry.user_data = tag
        return bool(md_uring_put(&self.ring, &entry))

    def prepare_cancel(self, uint64_t cancelled, uint64_t tag):
        cdef md_sqe entry
        self.check()
        memset(&entry, 0, sizeof(md_sqe))
        entry.opcode = MD_OP_ASYNC_CANCEL
        entry.addr = cancelled
        entry.user_data = tag
        return bool(md_uring_put(&self.ring, &entry))

    def reap(self):
        cdef md_cqe done
        self.check()
        completions = []
        while md_uring_take(&self.ring, &done):
            completions.append((done.user_data, done.res))
        return completions

    def close(self):
        cdef md_uring ring = self.ring
        if ring.fd < 0 or not self.pid:
            return
        if ring.in_flight and self.pid == getpid():
            raise ValueError("entries of the io_uring are in flight")
        self.ring.fd = -1
        with nogil:
            if self.pid == getpid():
                md_uring_forget_files(&ring)
            md_uring_close(&ring)


def open_uring(uint32_t entries, uint32_t completions, uint32_t flags):
    cdef Uring uring = Uring.__new__(Uring)
    cdef int rc
    with nogil:
        rc = md_uring_open(&uring.ring, entries, completions, flags)
    _check(rc, "io_uring_setup")
    uring.pid = getpid()
    return uring


def uring_enter(Uring uring not None, uint32_t wait, int64_t timeout):
    cdef int rc
    uring.check()
    with nogil:
        rc = md_uring_enter(&uring.ring, wait, timeout)
    if rc == -C_EINTR:
        PyErr_CheckSignals()
        return 0
    return _check(rc, "io_uring_enter")


def uring_register_files(Uring uring not None, fds):
    cdef int files[64]
    cdef uint32_t count = PyObject_Size(fds)
    uring.check()
    if count > 64:
        raise ValueError("uring_register_files: at most 64")
    for index, fd in enumerate(fds):
        files[index] = fd
    _check(md_uring_register(uring.ring.fd, MD_REGISTER_FILES, files, count), "io_uring_register")


def uring_register_buffers(Uring uring not None, uint32_t count):
    cdef bytes empty = bytes(<size_t>count * sizeof(iovec))
    uring.check()
    _check(
        md_uring_buffers(uring.ring.fd, <iovec *>PyBytes_AsString(empty), count),
        "io_uring_register",
    )


def uring_update_buffer(Uring uring not None, uint32_t slot, size_t address, size_t length):
    cdef int rc, fd = uring.ring.fd
    uring.check()
    with nogil:
        rc = md_uring_buffer(fd, slot, address, length)
    _check(rc, "io_uring_register")


def uring_register_eventfd(Uring uring not None, int fd):
    cdef int rc
    uring.check()
    if fd < 0:
        rc = md_uring_register(uring.ring.fd, MD_UNREGISTER_EVENTFD, NULL, 0)
    else:
        rc = md_uring_register(uring.ring.fd, MD_REGISTER_EVENTFD, &fd, 1)
    _check(rc, "io_uring_register")


def dio_alignment(int fd):
    cdef uint32_t memory = 0, offset = 0
    cdef int rc
    with nogil:
        rc = md_dio_alignment(fd, &memory, &offset)
    return (memory, offset) if _check(rc, "statx") else None


def pread(int fd, size_t address, size_t length, int64_t offset):
    cdef long rc
    with nogil:
        rc = md_pread(fd, address, length, offset)
    if rc == -C_EINTR:
        PyErr_CheckSignals()
    return _check(rc, "pread")


def pwrite(int fd, size_t address, size_t length, int64_t offset):
    cdef long rc
    with nogil:
        rc = md_pwrite(fd, address, length, offset)
    if rc == -C_EINTR:
        PyErr_CheckSignals()
    return _check(rc, "pwrite")
