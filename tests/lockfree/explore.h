/* Runs a lock-free algorithm through every interleaving of a few short programs.
 *
 * Include this, then the header that is tested, unchanged: its atomics and its futex become the
 * functions below. Each stops the thread that calls it before the access is made; the explorer
 * then makes every choice of what happens next, depth first, and goes on from each state once.
 *
 * Memory: each thread has a buffer of stores that the others do not see yet. They become visible
 * one by one, at any later time and in any order but for these: two stores to one place keep
 * theirs, a release store comes after all before it; and a fence, a read-modify-write and a system
 * call wait until the buffer is empty. That is x86's order, and a weaker one. Loads happen in
 * program order: what a missing `acquire` would do is not seen here, but by the thread sanitizer.
 *
 * A sleep has no limit here: one that only its time limit would end counts as a lost waking.
 *
 * The test: what lies in `world.shared`; threads, given to explore(); CHECK() inside them. All that
 * they remember lies in `world` or on their stacks, so that a state can be put back by a copy.
 */
#ifndef EXPLORE_H
#define EXPLORE_H

#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunused-value" /* of what the macros below give */

#ifndef SHARED /* bytes of memory */
#define SHARED 512
#endif
#ifndef PRIVATE
#define PRIVATE 1024
#endif
enum { THREADS = 3, STORES = 8, STACK = 8192, DEEPEST = 4096 };

struct store {
    uintptr_t at;
    uint64_t value;
    uint32_t size, release;
};

struct thread {
    ucontext_t context;
    uintptr_t live; /* of the stack, from here on up */
    uintptr_t asleep_on;
    const char *where, *what; /* the access that comes next */
    int drains;               /* it waits until the buffer is empty */
    int done, count;
    struct store stores[STORES];
};

static struct world {
    unsigned char shared[SHARED] __attribute__((aligned(64)));
    unsigned char private[PRIVATE] __attribute__((aligned(64)));
    struct thread threads[THREADS];
    int count; /* threads */
    char failure[160];
    unsigned char stacks[THREADS][STACK] __attribute__((aligned(64)));
} world;

static ucontext_t explorer;
static struct thread *self;
static void (*const *programs)(void);
static uint64_t area_at, area_length; /* twice in a row: the second is the first again */
static const char *mutation = "";     /* "function:access", which then goes wrong */

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition))                                                                          \
            fail(__VA_ARGS__);                                                                     \
    } while (0)

/* --- What a thread does ------------------------------------------------------------------- */

static __attribute__((noinline)) void pause_here(void) {
    self->live = (uintptr_t)__builtin_frame_address(0) - 64; /* what it saved lies below */
    swapcontext(&self->context, &explorer);
}

static void fail(const char *text, ...) {
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(world.failure, sizeof world.failure, text, arguments);
    va_end(arguments);
    if (self != NULL)
        pause_here(); /* for good */
}

static int mutated(const char *where, const char *what) {
    size_t length = strlen(where);
    return strncmp(mutation, where, length) == 0 && mutation[length] == ':' &&
           strcmp(mutation + length + 1, what) == 0;
}

static void stop_before(const char *where, const char *what, int drains) {
    if (self == NULL) /* the test itself, when no thread runs */
        return;
    self->where = where;
    self->what = what;
    self->drains = drains;
    pause_here();
    self->drains = 0;
}

static uintptr_t place(const volatile void *pointer) {
    uintptr_t at = (uintptr_t)pointer;
    return at - area_at >= area_length && at - area_at < 2 * area_length ? at - area_length : at;
}

static int is_shared(uintptr_t at) {
    return self != NULL && at >= (uintptr_t)world.shared && at < (uintptr_t)world.shared + SHARED;
}

static uint64_t raw_load(uintptr_t at, size_t size) {
    return size == 4 ? *(volatile uint32_t *)at : *(volatile uint64_t *)at;
}

static void raw_store(uintptr_t at, size_t size, uint64_t value) {
    if (size == 4)
        *(volatile uint32_t *)at = (uint32_t)value;
    else
        *(volatile uint64_t *)at = value;
}

static uint64_t hook_load(const char *where, const volatile void *pointer, size_t size) {
    uintptr_t at = place(pointer);
    if (!is_shared(at))
        return raw_load(at, size);
    stop_before(where, "load", 0);
    for (int i = self->count; i-- > 0;)
        if (self->stores[i].at == at && self->stores[i].size == size)
            return self->stores[i].value;
    return raw_load(at, size);
}

static void hook_store(const char *where, volatile void *pointer, size_t size, uint64_t value,
                       int order) {
    uintptr_t at = place(pointer);
    if (!is_shared(at)) {
        raw_store(at, size, value);
        return;
    }
    stop_before(where, "store", order == memory_order_seq_cst);
    if (order == memory_order_seq_cst)
        raw_store(at, size, value);
    else
        self->stores[self->count++] = (struct store){
            at, value, (uint32_t)size,
            order == memory_order_release && !mutated(where, "release")};
}

static __attribute__((unused)) void hook_fence(const char *where) {
    if (!mutated(where, "fence"))
        stop_before(where, "fence", 1);
}

static __attribute__((unused)) uint64_t hook_add(const char *where, volatile void *pointer, size_t size, uint64_t value) {
    uintptr_t at = place(pointer);
    if (is_shared(at))
        stop_before(where, "add", 1);
    uint64_t before = raw_load(at, size);
    if (!mutated(where, "add"))
        raw_store(at, size, before + value);
    return before;
}

/* Compare and exchange; for a swap, `expected` is NULL. */
static __attribute__((unused)) uint64_t hook_exchange(const char *where, volatile void *pointer, size_t size,
                              const uint64_t *expected, uint64_t value) {
    uintptr_t at = place(pointer);
    if (is_shared(at))
        stop_before(where, "exchange", 1);
    uint64_t before = mutated(where, "exchange") ? *expected : raw_load(at, size);
    if (expected == NULL || before == *expected)
        raw_store(at, size, value);
    return before;
}

static __attribute__((unused)) long hook_futex(const char *where, volatile void *word, int op, uint32_t value, ...) {
    if (op == FUTEX_WAKE) {
        stop_before(where, "wake", 1);
        for (int i = 0; i < world.count && !mutated(where, "wake"); i++)
            if (world.threads[i].asleep_on == place(word))
                world.threads[i].asleep_on = 0;
        return 0;
    }
    stop_before(where, "wait", 1);
    if (raw_load(place(word), 4) != value && !mutated(where, "wait")) {
        errno = EAGAIN;
        return -1;
    }
    self->asleep_on = place(word);
    self->what = "asleep";
    pause_here();
    return 0;
}

/* A socket of which it is only known whether something can be read: a word that is 0 or 1. */
static __attribute__((unused)) long hook_send(const char *where, int fd) {
    uintptr_t at = (uintptr_t)world.shared + (uintptr_t)fd;
    stop_before(where, "send", 1);
    if (mutated(where, "send"))
        return 1;
    raw_store(at, 4, 1);
    for (int i = 0; i < world.count; i++)
        if (world.threads[i].asleep_on == at)
            world.threads[i].asleep_on = 0;
    return 1;
}

static __attribute__((unused)) void hook_clear(int fd) {
    stop_before("the loop", "clear", 1);
    raw_store((uintptr_t)world.shared + (uintptr_t)fd, 4, 0);
}

static __attribute__((unused)) void hook_poll(int fd) {
    uintptr_t at = (uintptr_t)world.shared + (uintptr_t)fd;
    stop_before("the loop", "poll", 1);
    if (raw_load(at, 4) == 0) {
        self->asleep_on = at;
        self->what = "asleep";
        pause_here();
    }
}

#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_fetch_add_explicit
#undef atomic_exchange_explicit
#undef atomic_compare_exchange_strong_explicit
#undef atomic_compare_exchange_weak_explicit
#undef atomic_compare_exchange_strong
#undef atomic_thread_fence
#define atomic_load_explicit(pointer, order)                                                       \
    ((__typeof__(*(pointer)))hook_load(__func__, pointer, sizeof *(pointer)))
#define atomic_store_explicit(pointer, value, order)                                               \
    hook_store(__func__, pointer, sizeof *(pointer), (uint64_t)(value), order)
#define atomic_fetch_add_explicit(pointer, value, order)                                           \
    ((__typeof__(*(pointer)))hook_add(__func__, pointer, sizeof *(pointer), (uint64_t)(value)))
#define atomic_exchange_explicit(pointer, value, order)                                            \
    ((__typeof__(*(pointer)))hook_exchange(__func__, pointer, sizeof *(pointer), NULL,             \
                                           (uint64_t)(value)))
#define atomic_compare_exchange_strong_explicit(pointer, expected, value, order, otherwise)        \
    ({                                                                                             \
        uint64_t _wanted = *(expected), _seen;                                                     \
        _seen = hook_exchange(__func__, pointer, sizeof *(pointer), &_wanted, (uint64_t)(value));  \
        *(expected) = (__typeof__(*(expected)))_seen;                                              \
        _seen == _wanted;                                                                          \
    })
#define atomic_compare_exchange_strong(pointer, expected, value)                                   \
    atomic_compare_exchange_strong_explicit(pointer, expected, value, memory_order_seq_cst, 0)
#define atomic_compare_exchange_weak_explicit atomic_compare_exchange_strong_explicit
#define atomic_thread_fence(order) hook_fence(__func__)
#define syscall(number, word, op, value, ...) hook_futex(__func__, word, op, value, __VA_ARGS__)
#define send(fd, data, length, flags) hook_send(__func__, fd)
#define clock_gettime(clock, to) memset(to, 0, sizeof *(to)) /* time stands still */

/* --- The explorer ------------------------------------------------------------------------- */

static uint64_t *seen; /* hashes of the states that were gone on from */
static uint64_t seen_room, states, steps, ends;

static uint64_t mix(uint64_t hash, const void *data, size_t length) {
    const unsigned char *at = data;
    for (; length >= 8; at += 8, length -= 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 29;
    }
    return hash;
}

/* Bytes of a thread's stack that hold nothing; a multiple of 8. */
static size_t dead_stack(const struct world *of, int i) {
    const struct thread *it = &of->threads[i];
    return it->done ? STACK : (it->live - (uintptr_t)world.stacks[i]) & ~(size_t)7;
}

static void copy_world(struct world *to, const struct world *from) {
    memcpy(to, from, offsetof(struct world, stacks));
    for (int i = 0; i < from->count; i++) {
        size_t dead = dead_stack(from, i);
        memcpy(to->stacks[i] + dead, from->stacks[i] + dead, STACK - dead);
    }
}

static uint64_t hash_world(void) {
    uint64_t hash = mix(1, world.shared, SHARED);
    hash = mix(hash, world.private, PRIVATE);
    for (int i = 0; i < world.count; i++) {
        struct thread *it = &world.threads[i];
        uint64_t now[4] = {it->asleep_on, (uint64_t)it->done, (uint64_t)it->count,
                           (uint64_t)it->drains};
        hash = mix(hash, now, sizeof now);
        hash = mix(hash, it->stores, (size_t)it->count * sizeof it->stores[0]);
        if (it->done)
            continue;
        hash = mix(hash, &it->context.uc_mcontext, sizeof it->context.uc_mcontext);
        size_t dead = dead_stack(&world, i);
        hash = mix(hash, world.stacks[i] + dead, STACK - dead);
    }
    return hash ? hash : 1;
}

static void remember_more(void) {
    uint64_t *old = seen, room = seen_room;
    seen_room = room ? 2 * room : 1 << 16;
    seen = calloc(seen_room, sizeof *seen);
    if (seen == NULL)
        exit(3);
    for (uint64_t i = 0; i < room; i++)
        if (old[i]) {
            uint64_t at = old[i] & (seen_room - 1);
            while (seen[at])
                at = (at + 1) & (seen_room - 1);
            seen[at] = old[i];
        }
    free(old);
}

static int is_new(uint64_t hash) {
    if (2 * states >= seen_room)
        remember_more();
    uint64_t at = hash & (seen_room - 1);
    for (; seen[at]; at = (at + 1) & (seen_room - 1))
        if (seen[at] == hash)
            return 0;
    seen[at] = hash;
    states++;
    return 1;
}

/* Choice t: thread t goes on. Choice THREADS + t * STORES + i: its i-th store becomes visible. */
static int possible(int choice) {
    if (choice < THREADS) {
        struct thread *it = &world.threads[choice];
        return choice < world.count && !it->done && !it->asleep_on &&
               !(it->drains && it->count) && it->count < STORES;
    }
    struct thread *it = &world.threads[(choice - THREADS) / STORES];
    int which = (choice - THREADS) % STORES;
    if (which >= it->count)
        return 0;
    for (int i = 0; i < which; i++)
        if (it->stores[which].release || it->stores[i].at == it->stores[which].at)
            return 0;
    return 1;
}

static void take(int choice) {
    steps++;
    if (choice < THREADS) {
        self = &world.threads[choice];
        swapcontext(&explorer, &self->context);
        return;
    }
    struct thread *it = &world.threads[(choice - THREADS) / STORES];
    int which = (choice - THREADS) % STORES;
    struct store *store = &it->stores[which];
    raw_store(store->at, store->size, store->value);
    it->count--;
    memmove(store, store + 1, (size_t)(it->count - which) * sizeof *store);
    memset(&it->stores[it->count], 0, sizeof *store);
}

enum { CHOICES = THREADS + THREADS * STORES };

struct frame {
    struct world before;
    int choice;
    const char *where, *what;
};

static int tell(struct frame **path, int depth) {
    for (int i = 0; i < depth; i++) {
        int choice = path[i]->choice;
        if (choice < THREADS)
            printf("  thread %d: %s in %s\n", choice, path[i]->what, path[i]->where);
        else
            printf("  thread %d: a store becomes visible\n", (choice - THREADS) / STORES);
    }
    printf("after %d steps: %s\n", depth, world.failure);
    return 1;
}

static void finish(int end_check(void)) {
    int all = 1, buffered = 0;
    for (int i = 0; i < world.count; i++) {
        all &= world.threads[i].done;
        buffered |= world.threads[i].count;
    }
    ends++;
    if (!all)
        snprintf(world.failure, sizeof world.failure, "a lost waking: somebody sleeps for ever");
    else if (buffered || !end_check())
        snprintf(world.failure, sizeof world.failure, "the end does not add up");
}

/* From where the world is: every way to go on. 0, or 1 where one fails, which is told. */
static int search(int end_check(void)) {
    static struct frame *path[DEEPEST];
    int depth = 0;
    if (path[0] == NULL && (path[0] = malloc(sizeof *path[0])) == NULL)
        exit(3);
    copy_world(&path[0]->before, &world);
    path[0]->choice = -1;
    is_new(hash_world());
    while (depth >= 0) {
        struct frame *here = path[depth];
        copy_world(&world, &here->before);
        int any = here->choice >= 0;
        do
            here->choice++;
        while (here->choice < CHOICES && !possible(here->choice));
        if (here->choice == CHOICES) {
            if (!any)
                finish(end_check);
            if (world.failure[0])
                return tell(path, depth);
            depth--;
            continue;
        }
        if (here->choice < THREADS) {
            here->where = world.threads[here->choice].where;
            here->what = world.threads[here->choice].what;
        }
        take(here->choice);
        depth++;
        if (world.failure[0])
            return tell(path, depth);
        if (!is_new(hash_world())) {
            depth--;
            continue;
        }
        if (depth == DEEPEST || (path[depth] == NULL &&
                                 (path[depth] = malloc(sizeof *path[depth])) == NULL))
            exit(3);
        copy_world(&path[depth]->before, &world);
        path[depth]->choice = -1;
    }
    return 0;
}

static void run(int number) {
    programs[number]();
    world.threads[number].done = 1;
    pause_here();
}

/* Give every interleaving of the programs a run; `begin` sets the world up. */
static __attribute__((unused)) int explore(const char *name, void begin(void), int count,
                                           void (*const wanted[])(void),
                                           int end_check(void)) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&world, 0, sizeof world);
    self = NULL;
    free(seen);
    seen = NULL;
    seen_room = states = steps = ends = 0;
    world.count = count;
    programs = wanted;
    begin();
    for (int i = 0; i < count; i++) {
        struct thread *it = &world.threads[i];
        getcontext(&it->context);
        it->context.uc_stack.ss_sp = world.stacks[i];
        it->context.uc_stack.ss_size = STACK;
        makecontext(&it->context, (void (*)(void))run, 1, i);
        it->live = (uintptr_t)world.stacks[i] + STACK - 512;
        it->where = name;
        it->what = "start";
    }
    int failed = search(end_check);
    printf("%s: %llu states, %llu steps, %llu ends%s\n", name, (unsigned long long)states,
           (unsigned long long)steps, (unsigned long long)ends, failed ? ": FAILED" : "");
    return failed;
}

#endif
