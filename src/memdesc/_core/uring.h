/* An io_uring: set-up, entries, completions, by raw system calls.
 *
 * Contract: every function returns 0 or more, or -errno; it decides nothing and needs no Python.
 * One thread at a time may be in md_uring_put and md_uring_reap of a ring (the GIL sees to that);
 * md_uring_enter may run beside them. The kernel's side of the two rings is read with acquire and
 * ours published with release, as io_uring(7) asks for. The structures and numbers are those of
 * linux/io_uring.h, repeated here since headers older than the kernel lack some.
 */
#ifndef MEMDESC_URING_H
#define MEMDESC_URING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_enter 426
#define SYS_io_uring_register 427
#endif
#ifndef SYS_statx
#error "this architecture's number of statx is not known"
#endif

enum {
    MD_SETUP_CQSIZE = 1 << 3,
    MD_SETUP_CLAMP = 1 << 4,
    MD_ENTER_GETEVENTS = 1 << 0,
    MD_ENTER_EXT_ARG = 1 << 3,
    MD_OP_READ_FIXED = 4,
    MD_OP_WRITE_FIXED = 5,
    MD_OP_ASYNC_CANCEL = 14,
    MD_OP_READ = 22,
    MD_OP_WRITE = 23,
    MD_REGISTER_FILES = 2,
    MD_UNREGISTER_FILES = 3,
    MD_REGISTER_EVENTFD = 4,
    MD_UNREGISTER_EVENTFD = 5,
    MD_REGISTER_BUFFERS2 = 15,
    MD_REGISTER_BUFFERS_UPDATE = 16,
};

struct md_sqe {
    uint8_t opcode, flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off, addr;
    uint32_t len, rw_flags;
    uint64_t user_data;
    uint16_t buf_index, personality;
    int32_t splice_fd_in;
    uint64_t addr3, pad;
};

struct md_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct md_uring_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
    uint32_t resv[3];
    struct {
        uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1;
        uint64_t user_addr;
    } sq;
    struct {
        uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1;
        uint64_t user_addr;
    } cq;
};

_Static_assert(sizeof(struct md_sqe) == 64, "linux/io_uring.h: io_uring_sqe");
_Static_assert(sizeof(struct md_cqe) == 16, "linux/io_uring.h: io_uring_cqe");
_Static_assert(sizeof(struct md_uring_params) == 120, "linux/io_uring.h: io_uring_params");

struct md_uring {
    int fd;
    uint32_t features, entries, completions;
    uint32_t tail;      /* of the entries prepared; only this side moves it */
    uint32_t head;      /* of the completions taken; only this side moves it */
    uint64_t in_flight; /* entries put, whose completion was not taken */
    unsigned char *rings;
    size_t rings_size;
    struct md_sqe *sqes;
    size_t sqes_size;
    _Atomic uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t *sq_array;
    struct md_cqe *cqes;
    uint32_t sq_mask, cq_mask;
};

static inline void md_uring_close(struct md_uring *ring) {
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    if (ring->fd >= 0)
        close(ring->fd);
    ring->fd = -1;
    ring->sqes = NULL;
    ring->rings = NULL;
}

static inline void *md_uring_map(int fd, size_t size, off_t what) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
    return at == MAP_FAILED ? NULL : at;
}

/* The kernel rounds both sizes up to powers of two. Since Linux 5.4 one mapping holds both rings. */
static inline int md_uring_open(struct md_uring *ring, uint32_t entries, uint32_t completions,
                                uint32_t flags) {
    struct md_uring_params p;
    memset(&p, 0, sizeof p);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
    p.flags = flags | MD_SETUP_CQSIZE | MD_SETUP_CLAMP;
    p.cq_entries = completions;
    long fd = syscall(SYS_io_uring_setup, entries, &p);
    if (fd < 0)
        return -errno;
    ring->fd = (int)fd;
    ring->features = p.features;
    ring->entries = p.sq_entries;
    ring->completions = p.cq_entries;
    size_t sq = p.sq.array + p.sq_entries * sizeof(uint32_t);
    size_t cq = p.cq.cqes + p.cq_entries * sizeof(struct md_cqe);
    ring->rings_size = sq > cq ? sq : cq;
    ring->sqes_size = p.sq_entries * sizeof(struct md_sqe);
    ring->rings = (unsigned char *)md_uring_map(ring->fd, ring->rings_size, 0);
    if (ring->rings)
        ring->sqes = (struct md_sqe *)md_uring_map(ring->fd, ring->sqes_size, 0x10000000);
    if (!ring->sqes) {
        int error = errno;
        md_uring_close(ring);
        return -error;
    }
    ring->sq_head = (_Atomic uint32_t *)(ring->rings + p.sq.head);
    ring->sq_tail = (_Atomic uint32_t *)(ring->rings + p.sq.tail);
    ring->cq_head = (_Atomic uint32_t *)(ring->rings + p.cq.head);
    ring->cq_tail = (_Atomic uint32_t *)(ring->rings + p.cq.tail);
    ring->sq_array = (uint32_t *)(ring->rings + p.sq.array);
    ring->cqes = (struct md_cqe *)(ring->rings + p.cq.cqes);
    ring->sq_mask = p.sq_entries - 1;
    ring->cq_mask = p.cq_entries - 1;
    return 0;
}

/* Entries that were put and that the kernel has not taken yet. */
static inline uint32_t md_uring_pending(struct md_uring *ring) {
    return ring->tail - atomic_load_explicit(ring->sq_head, memory_order_acquire);
}

/* Put an entry: 1, or 0 where there is no room, for it or for its completion. */
static inline int md_uring_put(struct md_uring *ring, const struct md_sqe *entry) {
    if (md_uring_pending(ring) >= ring->entries || ring->in_flight >= ring->completions)
        return 0;
    uint32_t index = ring->tail & ring->sq_mask;
    ring->sqes[index] = *entry;
    ring->sq_array[index] = index;
    ring->tail++;
    ring->in_flight++;
    atomic_store_explicit(ring->sq_tail, ring->tail, memory_order_release);
    return 1;
}

/* Take a completion: 1, or 0 where there is none. */
static inline int md_uring_take(struct md_uring *ring, struct md_cqe *into) {
    if (ring->head == atomic_load_explicit(ring->cq_tail, memory_order_acquire))
        return 0;
    *into = ring->cqes[ring->head & ring->cq_mask];
    ring->head++;
    ring->in_flight--;
    atomic_store_explicit(ring->cq_head, ring->head, memory_order_release);
    return 1;
}

/* Submit what was put, and wait for so many completions to be there, for at most `timeout`
 * nanoseconds (negative: for ever). Gives how many entries were submitted. */
static inline int md_uring_enter(struct md_uring *ring, uint32_t wait, int64_t timeout) {
    struct {
        int64_t sec, nsec;
    } time = {timeout / 1000000000, timeout % 1000000000};
    struct {
        uint64_t sigmask;
        uint32_t sigmask_size, pad;
        uint64_t ts;
    } extra = {0, 8, 0, (uint64_t)(uintptr_t)&time};
    uint32_t flags = wait ? MD_ENTER_GETEVENTS : 0;
    int timed = wait && timeout >= 0;
    long rc = syscall(SYS_io_uring_enter, ring->fd, md_uring_pending(ring), wait,
                      flags | (timed ? MD_ENTER_EXT_ARG : 0), timed ? (void *)&extra : NULL,
                      timed ? sizeof extra : 8);
    return rc < 0 ? -errno : (int)rc;
}

static inline int md_uring_register(int fd, uint32_t what, const void *argument, uint32_t count) {
    long rc = syscall(SYS_io_uring_register, fd, what, argument, count);
    return rc < 0 ? -errno : (int)rc;
}

/* A table of so many buffers, all empty (Linux 5.13). */
static inline int md_uring_buffers(int fd, const struct iovec *empty, uint32_t count) {
    struct {
        uint32_t nr, flags;
        uint64_t resv2, data, tags;
    } table = {count, 0, 0, (uint64_t)(uintptr_t)empty, 0};
    return md_uring_register(fd, MD_REGISTER_BUFFERS2, &table, sizeof table);
}

/* Have a place of the table mean these bytes; length 0: none. */
static inline int md_uring_buffer(int fd, uint32_t slot, uintptr_t address, size_t length) {
    struct iovec memory = {length ? (void *)address : NULL, length};
    struct {
        uint32_t offset, resv;
        uint64_t data, tags;
        uint32_t nr, resv2;
    } update = {slot, 0, (uint64_t)(uintptr_t)&memory, 0, 1, 0};
    return md_uring_register(fd, MD_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
}

/* Let go of the registered files now: those of a closed ring go some time later. Not for the ring
 * of another process, which shares them. */
static inline void md_uring_forget_files(struct md_uring *ring) {
    (void)md_uring_register(ring->fd, MD_UNREGISTER_FILES, NULL, 0);
}

/* End a ring whose memory is about to go: wait for what is in flight, cancelled where that can be.
 * What was put and never submitted is dropped. */
static inline void md_uring_drain(struct md_uring *ring) {
    struct md_cqe gone;
    uint32_t pending = md_uring_pending(ring);
    ring->tail -= pending;
    ring->in_flight -= pending;
    atomic_store_explicit(ring->sq_tail, ring->tail, memory_order_release);
    while (md_uring_take(ring, &gone))
        ;
    if (ring->in_flight) {
        struct md_sqe cancel; /* IORING_ASYNC_CANCEL_ANY (Linux 5.19); unknown before, and refused */
        memset(&cancel, 0, sizeof cancel);
        cancel.opcode = MD_OP_ASYNC_CANCEL;
        cancel.rw_flags = 1 << 0 | 1 << 2;
        md_uring_put(ring, &cancel);
    }
    while (ring->in_flight) {
        int rc = md_uring_enter(ring, 1, -1);
        if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
            return;
        while (md_uring_take(ring, &gone))
            ;
    }
}

/* What O_DIRECT asks of a file (statx, Linux 6.1): 1, or 0 where the kernel does not say. An
 * offset of 0 is the answer that the file does not take O_DIRECT at all. */
static inline int md_dio_alignment(int fd, uint32_t *memory, uint32_t *offset) {
    struct {
        uint32_t mask, blksize;
        unsigned char between[144];
        uint32_t dio_mem_align, dio_offset_align;
        uint64_t spare[12];
    } status;
    _Static_assert(offsetof(__typeof__(status), dio_mem_align) == 152, "linux/stat.h: statx");
    _Static_assert(sizeof status == 256, "linux/stat.h: statx");
    memset(&status, 0, sizeof status);
    const uint32_t wanted = 0x2000, empty_path = 0x1000; /* STATX_DIOALIGN, AT_EMPTY_PATH */
    if (syscall(SYS_statx, fd, "", empty_path, wanted, &status) < 0)
        return -errno;
    *memory = status.dio_mem_align;
    *offset = status.dio_offset_align;
    return (status.mask & wanted) != 0;
}

static inline long md_pread(int fd, uintptr_t address, size_t length, int64_t offset) {
    ssize_t rc = pread(fd, (void *)address, length, (off_t)offset);
    return rc < 0 ? -(long)errno : rc;
}

static inline long md_pwrite(int fd, uintptr_t address, size_t length, int64_t offset) {
    ssize_t rc = pwrite(fd, (const void *)address, length, (off_t)offset);
    return rc < 0 ? -(long)errno : rc;
}

#endif
