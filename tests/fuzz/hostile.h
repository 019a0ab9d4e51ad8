/* Runs an algorithm in shared memory against a peer that writes there whatever it likes.
 *
 * Include this, then the header that is tested, unchanged. The fuzzer's input says what both ends
 * do, and what the hostile peer writes before each access that an end makes: also between two
 * reads of one value. Only then is an end's sleep over, and only then does time pass.
 *
 * libFuzzer runs it, compiled by gcc: which has no counters of libFuzzer's own kind, so it calls
 * a function at each branch, and that counts.
 */
#ifndef HOSTILE_H
#define HOSTILE_H

#include "../lockfree/common.h"

#include <errno.h>
#include <linux/futex.h>
#include <sanitizer/asan_interface.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

int LLVMFuzzerRunDriver(int *count, char ***arguments, int (*one)(const uint8_t *, size_t));

__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t branches[1 << 13];

__attribute__((no_sanitize_coverage, no_sanitize("address"), used)) void
__wrap___sanitizer_cov_trace_pc(void) {
    uintptr_t from = (uintptr_t)__builtin_return_address(0);
    branches[(from ^ from >> 13) % sizeof branches]++;
}

/* --- The input ---------------------------------------------------------------------------- */

static const uint8_t *input, *input_end;

static inline uint8_t next_byte(void) { return input < input_end ? *input++ : 0; }

static inline uint64_t next_word(int bytes) {
    uint64_t word = 0;
    while (bytes--)
        word = word << 8 | next_byte();
    return word;
}

/* A value that is likely to hurt, or to pass: `near` is one that would be right. */
static inline uint64_t next_value(uint64_t near) {
    switch (next_byte() % 8) {
    case 0: return near;
    case 1: return near + (uint64_t)(int64_t)(int8_t)next_byte();
    case 2: return near + 8 * (uint64_t)(int64_t)(int8_t)next_byte();
    case 3: return next_byte();
    case 4: return next_word(2);
    case 5: return ~(uint64_t)next_byte();
    case 6: return (uint64_t)1 << next_byte() % 64;
    default: return next_word(8);
    }
}

/* --- The peer ----------------------------------------------------------------------------- */

static int honest; /* nothing was written that should not be */

static void hostile_write(uint8_t what); /* by the test: `what` of its places, any value */

/* Most often nothing, or few inputs would get far. */
static inline void hostile_turn(void) {
    uint8_t what = next_byte();
    if (what >= 192) {
        honest = 0;
        hostile_write(what - 192);
    }
}

static uint64_t hostile_clock;

static inline int hostile_time(struct timespec *now) {
    hostile_clock += 400;
    now->tv_sec = (time_t)(hostile_clock / 1000000000);
    now->tv_nsec = (long)(hostile_clock % 1000000000);
    return 0;
}

static inline long hostile_futex(int op, ...) {
    hostile_turn();
    if (op != FUTEX_WAIT || next_byte() % 4)
        return 0;
    static const int errors[] = {EAGAIN, EINTR, ETIMEDOUT};
    errno = errors[next_byte() % 3];
    return -1;
}

#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_fetch_add_explicit
#undef atomic_exchange_explicit
#undef atomic_compare_exchange_strong_explicit
#undef atomic_compare_exchange_weak_explicit
#undef atomic_compare_exchange_strong
#define atomic_load_explicit(at, order) (hostile_turn(), __atomic_load_n(at, order))
#define atomic_store_explicit(at, value, order)                                                    \
    (hostile_turn(), __atomic_store_n(at, value, order))
#define atomic_fetch_add_explicit(at, value, order)                                                \
    (hostile_turn(), __atomic_fetch_add(at, value, order))
#define atomic_exchange_explicit(at, value, order)                                                 \
    (hostile_turn(), __atomic_exchange_n(at, value, order))
#define atomic_compare_exchange_strong_explicit(at, expected, value, order, otherwise)             \
    (hostile_turn(), __atomic_compare_exchange_n(at, expected, value, 0, order, otherwise))
#define atomic_compare_exchange_strong(at, expected, value)                                        \
    atomic_compare_exchange_strong_explicit(at, expected, value, memory_order_seq_cst,             \
                                            memory_order_seq_cst)
#define atomic_compare_exchange_weak_explicit(at, expected, value, order, otherwise)               \
    (hostile_turn(), __atomic_compare_exchange_n(at, expected, value, 1, order, otherwise))
#define syscall(number, word, op, ...) hostile_futex(op, word, __VA_ARGS__)
#define clock_gettime(clock, to) hostile_time(to)
#define sched_yield() hostile_turn()

#endif
