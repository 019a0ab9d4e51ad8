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
 * Waking: waking.h. Who publishes a position looks whether what the other wants was crossed.
 *
 * Contract: the caller sees to it that one thread at a time is in an end, but for md_sleep, which
 * touches `wanted` alone. This header compiles alone.
 */
#ifndef MEMDESC_RING_H
#define MEMDESC_RING_H

#include "waking.h"

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
    _Atomic uint32_t listens;  /* not 0: an event loop waits for me: wake me by the socket too */
};
_Static_assert(sizeof(struct md_ring_side) <= 64, "one cache line");

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
    int bell_fd; /* socket that is told of a waking too, if the other listens; -1: none */
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

/* What this end waits for: where the other is, or its end. */
static inline struct md_wait md_ring_wait(struct md_ring *ring) {
    return (struct md_wait){&ring->theirs->position, &ring->mine->wanted, &ring->theirs->bell,
                            &ring->theirs->closed,   &ring->gone,         &ring->sleeps};
}

/* Wake the other. */
static inline void md_ring_wake(struct md_ring *ring) {
    uint32_t listens = atomic_load_explicit(&ring->theirs->listens, memory_order_relaxed);
    ring->rung++;
    md_wake(&ring->mine->bell, listens ? ring->bell_fd : -1);
}

/* From here on be woken by the socket too. Before md_want, whose fence is this one's. */
static inline void md_ring_listen(struct md_ring *ring) {
    atomic_store_explicit(&ring->mine->listens, 1, memory_order_relaxed);
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
        md_ring_wake(ring);
}

static inline void md_ring_close(struct md_ring *ring) {
    atomic_store_explicit(&ring->mine->closed, 1, memory_order_seq_cst);
    md_ring_wake(ring);
}

/* Have this end's own waiters look: the other is known as ended, or this end is closed. One that is
 * just about to sleep may miss it; the limit of its sleep is short. */
static inline void md_ring_stop(struct md_ring *ring) {
    atomic_store_explicit(&ring->gone, 1, memory_order_seq_cst);
    md_stir(&ring->theirs->bell);
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

#endif
