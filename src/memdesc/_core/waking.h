/* Sleeping until another task is so far, and waking whoever sleeps. Shared by ring.h and offers.h.
 *
 * Each side has a position that only grows, which it alone, or by agreement both, move forward. Who
 * waits writes which position it waits for (`wanted`) and looks again; who moved looks whether that
 * was reached, and if so rings: changes its `bell`, on which the other sleeps. A full fence on each
 * side lies between, so one of them sees the other. It is reached once: one waking, not one a step.
 *
 * Whatever the other side writes there, it wakes this one for nothing, or not at all: the limit of
 * a sleep is the caller's. This header compiles alone.
 */
#ifndef MEMDESC_WAKING_H
#define MEMDESC_WAKING_H

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
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "lock-free");

/* What one waits for: the other side's position, or its end, or that `gone` is set. */
struct md_wait {
    _Atomic uint64_t *position, *wanted; /* the other's; mine */
    _Atomic uint32_t *bell, *ended;      /* the other's: it changes when it wakes me; not 0: done */
    _Atomic int *gone;                   /* mine: whoever waits is to look again */
    uint64_t *sleeps;
};

static inline uint64_t md_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void md_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline long md_futex(_Atomic uint32_t *word, int op, uint32_t value,
                            const struct timespec *limit) {
    /* Not FUTEX_PRIVATE_FLAG: the word is shared between tasks. */
    return syscall(SYS_futex, word, op, value, limit, NULL, 0);
}

/* Have who sleeps on a bell look again. One that is just about to sleep may miss it. */
static inline void md_stir(_Atomic uint32_t *bell) { md_futex(bell, FUTEX_WAKE, INT_MAX, NULL); }

/* Wake the other: whoever sleeps on my bell, and whose loop waits on the socket, if there is one. */
static inline void md_wake(_Atomic uint32_t *bell, int fd) {
    atomic_fetch_add_explicit(bell, 1, memory_order_seq_cst);
    md_stir(bell);
    /* A socket that is full tells the same already; one that is gone, nobody. MSG_DONTWAIT is of
     * this call, so that the other end can not take it off, as it can O_NONBLOCK of an eventfd. */
    if (fd >= 0 && send(fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return;
}

/* Ask to be woken when the other reaches a position; then look again. */
static inline void md_want(_Atomic uint64_t *mine, uint64_t wanted) {
    atomic_store_explicit(mine, wanted, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

static inline int md_reached(const struct md_wait *wait, uint64_t wanted) {
    return atomic_load_explicit(wait->position, memory_order_acquire) >= wanted ||
           atomic_load_explicit(wait->ended, memory_order_acquire) != 0 ||
           atomic_load_explicit(wait->gone, memory_order_relaxed);
}

/* Wait until the other is at `wanted`, or has ended: for `spin` nanoseconds at first without
 * sleeping (about a microsecond of pauses, then letting others run, and so on), for at most `limit`
 * in all.
 * 0: look again. -ETIMEDOUT. -EINTR: a signal. Needs no lock. */
static inline int md_sleep(const struct md_wait *wait, uint64_t wanted, uint64_t spin,
                           uint64_t limit) {
    uint64_t start = md_now(), passed = 0;
    spin = spin < limit ? spin : limit;
    while (passed < spin) {
        for (int turn = 0; turn < 32; turn++) {
            if (md_reached(wait, wanted))
                return 0;
            md_pause();
        }
        sched_yield();
        passed = md_now() - start;
    }
    if (md_reached(wait, wanted))
        return 0;
    if (passed >= limit)
        return -ETIMEDOUT;
    struct timespec left = {(time_t)((limit - passed) / 1000000000u),
                            (long)((limit - passed) % 1000000000u)};
    uint32_t heard = atomic_load_explicit(wait->bell, memory_order_acquire);
    md_want(wait->wanted, wanted);
    int rc = 0;
    if (!md_reached(wait, wanted)) {
        ++*wait->sleeps;
        if (md_futex(wait->bell, FUTEX_WAIT, heard, &left) < 0 && errno != EAGAIN)
            rc = -errno;
    }
    return md_reached(wait, wanted) ? 0 : rc;
}

#endif
