/* A ring of entries of any size, between one producer and one consumer that do not trust each
 * other. What lies where in the shared memory: `memdesc/queues/layout.py`.
 *
 * The data area is mapped twice in a row, so that every entry is contiguous: nothing ever wraps,
 * and an empty ring takes an entry of the whole area. Positions count bytes since the ring was
 * made and only grow; a byte lies at its position modulo the capacity.
 *
 * Each end knows its own position and the last position of the other that passed the check. A
 * shared value is read once, checked, and the copy used: an end reaches no byte outside the area,
 * whatever is written to the shared memory. After -EPROTO an end is broken for ever.
 *
 * Waking: who waits writes which position of the other end it waits for (`wanted`) and looks
 * again; who publishes a position looks whether that was crossed. A full fence on each side lies
 * between, so one of them sees the other. It is crossed once: one waking, not one an entry.
 *
 * Contract: the caller sees to it that one thread at a time is in an end, but for md_ring_sleep,
 * which touches `wanted` alone. This header compiles alone.
 */
#ifndef MEMDESC_RING_H
#define MEMDESC_RING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MD_RING_MAGIC UINT64_C(0x31475251434d444d) /* "MDMCQRG1" */
#define MD_RING_HEADER ((uint64_t)8)               /* before each entry: its size */
#define MD_RING_LAST (UINT64_MAX >> 1)             /* no position is beyond */
#define MD_RING_NONE UINT64_MAX

/* The first line of an end's page; nobody else writes it. */
struct md_ring_side {
    _Atomic uint64_t position; /* the producer's: tail; the consumer's: head */
    _Atomic uint64_t wanted;   /* the other's position that is to wake me; 0: none */
    _Atomic uint32_t bell;     /* futex: changes when I wake the other */
    _Atomic uint32_t closed;   /* not 0: I am done */
    uint64_t magic;            /* in the producer's page, by who makes the ring */
};
_Static_assert(sizeof(struct md_ring_side) <= 64, "one cache line");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "lock-free");

/* What an end knows by itself. */
struct md_ring {
    struct md_ring_side *mine, *theirs;
    unsigned char *data; /* 2 * capacity bytes: the area twice */
    uint64_t capacity;   /* of the area: a multiple of 8 */
    uint64_t position;   /* where I am */
    uint64_t published;  /* what the other was told of that */
    uint64_t limit;      /* where the other is, as last seen and checked */
    uint64_t entry;      /* size of the entry at the consumer's position, once read */
    int producer;
    int broken;
    int bell_fd; /* socket that is also told of a waking; -1: none */
    _Atomic int gone; /* the other is known to have ended, or I was closed */
    uint64_t entries, bytes, rung, sleeps;
};

/* Bytes that an entry of `size` takes; the caller has seen that size <= capacity - 8. */
static inline uint64_t md_ring_extent(uint64_t size) {
    return MD_RING_HEADER + ((size + 7) & ~(uint64_t)7);
}

static inline int md_ring_break(struct md_ring *ring) {
    ring->broken = 1;
    return -EPROTO;
}

/* Read where the other end is. 0, or -EPROTO. */
static inline int md_ring_look(struct md_ring *ring) {
    uint64_t seen = atomic_load_explicit(&ring->theirs->position, memory_order_acquire);
    uint64_t most = ring->producer ? ring->published : ring->published + ring->capacity;
    if (ring->broken || seen < ring->limit || seen > most || seen % 8)
        return md_ring_break(ring);
    ring->limit = seen;
    return 0;
}

/* Take an end up where the shared memory says that it stands; 0, or -EPROTO. */
static inline int md_ring_begin(struct md_ring *ring) {
    uint64_t mine = atomic_load_explicit(&ring->mine->position, memory_order_relaxed);
    uint64_t theirs = atomic_load_explicit(&ring->theirs->position, memory_order_acquire);
    uint64_t tail = ring->producer ? mine : theirs, head = ring->producer ? theirs : mine;
    if (mine % 8 || theirs % 8 || tail > MD_RING_LAST || tail < head ||
        tail - head > ring->capacity)
        return md_ring_break(ring);
    ring->position = ring->published = mine;
    ring->limit = theirs;
    ring->entry = MD_RING_NONE;
    return 0;
}

/* Whether the other said that it is done, or is known to be. */
static inline int md_ring_ended(struct md_ring *ring) {
    return atomic_load_explicit(&ring->theirs->closed, memory_order_acquire) != 0 ||
           atomic_load_explicit(&ring->gone, memory_order_relaxed);
}

static inline long md_futex(_Atomic uint32_t *word, int op, uint32_t value,
                            const struct timespec *limit) {
    /* Not FUTEX_PRIVATE_FLAG: the word is shared between tasks. */
    return syscall(SYS_futex, word, op, value, limit, NULL, 0);
}

static inline void md_ring_ring(struct md_ring *ring) {
    ring->rung++;
    atomic_fetch_add_explicit(&ring->mine->bell, 1, memory_order_seq_cst);
    md_futex(&ring->mine->bell, FUTEX_WAKE, INT_MAX, NULL);
    /* A socket that is full tells the same already; one that is gone, nobody. MSG_DONTWAIT is of
     * this call, so that the other end can not take it off, as it can O_NONBLOCK of an eventfd. */
    if (ring->bell_fd >= 0 && send(ring->bell_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return;
}

/* Tell the other where I am, and wake it if it waits for that. */
static inline void md_ring_publish(struct md_ring *ring) {
    uint64_t before = ring->published;
    if (before == ring->position)
        return;
    ring->published = ring->position;
    atomic_store_explicit(&ring->mine->position, ring->position, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint64_t wanted = atomic_load_explicit(&ring->theirs->wanted, memory_order_relaxed);
    if (before < wanted && wanted <= ring->position)
        md_ring_ring(ring);
}

static inline void md_ring_close(struct md_ring *ring) {
    atomic_store_explicit(&ring->mine->closed, 1, memory_order_seq_cst);
    md_ring_ring(ring);
}

/* Have this end's own waiters look: the other is known as ended, or this end is closed. One that is
 * just about to sleep may miss it; the limit of its sleep is short. */
static inline void md_ring_stop(struct md_ring *ring) {
    atomic_store_explicit(&ring->gone, 1, memory_order_seq_cst);
    md_futex(&ring->theirs->bell, FUTEX_WAKE, INT_MAX, NULL);
}

/* Ask to be told when the other crosses `wanted`; then look again. */
static inline void md_ring_want(struct md_ring *ring, uint64_t wanted) {
    atomic_store_explicit(&ring->mine->wanted, wanted, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

/* --- The producer ------------------------------------------------------------------------- */

/* Whether an entry of `size` fits now: 1, 0, or -EPROTO. The caller has checked the largest. */
static inline int md_ring_room(struct md_ring *ring, uint64_t size) {
    uint64_t need = md_ring_extent(size);
    if (ring->broken)
        return -EPROTO;
    if (ring->capacity - (ring->position - ring->limit) >= need)
        return 1;
    int rc = md_ring_look(ring);
    return rc < 0 ? rc : ring->capacity - (ring->position - ring->limit) >= need;
}

/* Where the next entry's bytes go; there is room. */
static inline unsigned char *md_ring_target(struct md_ring *ring) {
    return ring->data + ring->position % ring->capacity + MD_RING_HEADER;
}

/* The bytes are there: have the entry, not yet published. */
static inline void md_ring_put(struct md_ring *ring, uint64_t size) {
    unsigned char *at = ring->data + ring->position % ring->capacity;
    atomic_store_explicit((_Atomic uint64_t *)at, size, memory_order_relaxed);
    ring->position += md_ring_extent(size);
    ring->entries++;
    ring->bytes += size;
}

/* --- The consumer ------------------------------------------------------------------------- */

/* Find the next entry: 1 (its size in `entry`), 0: empty, or -EPROTO. */
static inline int md_ring_next(struct md_ring *ring) {
    if (ring->broken)
        return -EPROTO;
    if (ring->entry != MD_RING_NONE)
        return 1;
    if (ring->limit == ring->position && md_ring_look(ring) < 0)
        return -EPROTO;
    uint64_t there = ring->limit - ring->position; /* a multiple of 8, at most the capacity */
    if (there == 0)
        return 0;
    unsigned char *at = ring->data + ring->position % ring->capacity;
    uint64_t size = atomic_load_explicit((_Atomic uint64_t *)at, memory_order_relaxed);
    if (size > there - MD_RING_HEADER)
        return md_ring_break(ring);
    ring->entry = size;
    return 1;
}

static inline unsigned char *md_ring_source(struct md_ring *ring) {
    return ring->data + ring->position % ring->capacity + MD_RING_HEADER;
}

/* Be done with the entry that was found; not yet published. */
static inline void md_ring_drop(struct md_ring *ring) {
    ring->position += md_ring_extent(ring->entry);
    ring->entries++;
    ring->bytes += ring->entry;
    ring->entry = MD_RING_NONE;
}

/* --- Waiting ------------------------------------------------------------------------------ */

static inline uint64_t md_ring_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void md_ring_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline int md_ring_reached(struct md_ring *ring, uint64_t wanted) {
    return atomic_load_explicit(&ring->theirs->position, memory_order_acquire) >= wanted ||
           md_ring_ended(ring);
}

/* Wait until the other is at `wanted`, or has ended: for `spin` nanoseconds at first without
 * sleeping (about a microsecond of pauses, then letting others run, and so on), for at most `limit`
 * in all.
 * 0: look again. -ETIMEDOUT. -EINTR: a signal. Needs no lock. */
static inline int md_ring_sleep(struct md_ring *ring, uint64_t wanted, uint64_t spin,
                                uint64_t limit) {
    uint64_t start = md_ring_now(), passed = 0;
    spin = spin < limit ? spin : limit;
    while (passed < spin) {
        for (int turn = 0; turn < 32; turn++) {
            if (md_ring_reached(ring, wanted))
                return 0;
            md_ring_pause();
        }
        sched_yield();
        passed = md_ring_now() - start;
    }
    if (md_ring_reached(ring, wanted))
        return 0;
    if (passed >= limit)
        return -ETIMEDOUT;
    struct timespec left = {(time_t)((limit - passed) / 1000000000u),
                            (long)((limit - passed) % 1000000000u)};
    uint32_t heard = atomic_load_explicit(&ring->theirs->bell, memory_order_acquire);
    md_ring_want(ring, wanted);
    int rc = 0;
    if (!md_ring_reached(ring, wanted)) {
        ring->sleeps++;
        if (md_futex(&ring->theirs->bell, FUTEX_WAIT, heard, &left) < 0 && errno != EAGAIN)
            rc = -errno;
    }
    return md_ring_reached(ring, wanted) ? 0 : rc;
}

#endif
