/* The ring (ring.h) in every interleaving of short programs; see explore.h.
 *
 *   explore_ring [--long] [--mutate FUNCTION:ACCESS]
 *
 * Entries of one word each, the number of the entry; a consumer that takes an entry with another
 * number, or another size, has found one lost, doubled or torn.
 */
#include "explore.h"

#include "ring.h"

static struct plan {
    int capacity, entries, batch; /* the producer publishes and the consumer drops so many at once */
    int listens; /* on its socket, as a loop does, waits: 1: the consumer, 2: the producer */
    int wait_for;                 /* entries that the consumer waits for at first */
    int leaves_after;             /* entries after which the consumer closes; 0: never */
} plan;

#define SIDES ((struct md_ring_side *)(void *)world.shared)
#define DATA (world.shared + 128)
#define RINGS ((struct md_ring *)(void *)world.private)
#define TAKEN (*(int *)(void *)(world.private + 512))
#define PUT (*(int *)(void *)(world.private + 516))
enum { ENTRY = 16 };
_Static_assert(2 * sizeof(struct md_ring_side) <= 128 && 2 * sizeof(struct md_ring) <= 512, "room");

static int listens(const struct md_ring *ring) { return plan.listens == (ring->producer ? 2 : 1); }

/* On which an end waits. */
static int socket_of(const struct md_ring *ring) { return SHARED - 8 + (ring->producer ? 4 : 0); }

static void begin(void) {
    area_at = (uintptr_t)DATA;
    area_length = (uint64_t)plan.capacity;
    for (int i = 0; i < 2; i++) {
        struct md_ring *ring = &RINGS[i];
        ring->producer = i == 0;
        ring->mine = &SIDES[i];
        ring->theirs = &SIDES[1 - i];
        ring->data = DATA;
        ring->capacity = (uint64_t)plan.capacity;
        ring->bell_fd = plan.listens ? socket_of(&RINGS[1 - i]) : -1;
        ring->entry = MD_RING_NONE;
    }
    /* Near a value where a counter of 32 bits would begin anew. */
    SIDES[0].position = SIDES[1].position = (UINT64_C(1) << 32) - 16;
    for (int i = 0; i < 2; i++)
        if (md_ring_begin(&RINGS[i]) < 0)
            fail("md_ring_begin");
}

/* Wait as queues/waiting.py does. What it counts is no part of the state. */
static void wait_until(struct md_ring *ring, uint64_t wanted) {
    struct md_wait wait = md_ring_wait(ring);
    int rc = md_sleep(&wait, wanted, 0, 1000000000);
    CHECK(rc == 0, "md_sleep gave %d", rc);
    ring->sleeps = 0;
}

/* As RingProducer.put. */
static int put(struct md_ring *ring, int number) {
    int rc = md_ring_room(ring, 8);
    if (rc == 0 && listens(ring)) {
        hook_clear(socket_of(ring));
        md_want(&ring->mine->wanted, ring->position + ENTRY - ring->capacity);
        rc = md_ring_ended(ring) ? 0 : md_ring_room(ring, 8);
    }
    CHECK(rc >= 0, "the producer found %d", rc);
    if (rc == 0)
        return 0;
    uint64_t *at = (uint64_t *)(void *)md_ring_target(ring);
    atomic_store_explicit(at, (uint64_t)number, memory_order_relaxed);
    md_ring_put(ring, 8);
    return 1;
}

static void producer(void) {
    struct md_ring *ring = &RINGS[0];
    if (listens(ring))
        md_ring_listen(ring);
    for (int next = 0; next < plan.entries && !md_ring_ended(ring);) {
        int last = next + plan.batch < plan.entries ? next + plan.batch : plan.entries;
        int first = next;
        while (next < last && put(ring, next))
            next++;
        PUT = next;
        md_ring_publish(ring);
        ring->rung = 0;
        if (next == first && listens(ring) && !md_ring_ended(ring))
            hook_poll(socket_of(ring));
        else if (next == first)
            wait_until(ring, ring->position + ENTRY - ring->capacity);
    }
    md_ring_close(ring);
    ring->rung = 0;
}

/* As RingConsumer.begin_take: 1, 0: empty, -1: the other is done. */
static int find(struct md_ring *ring) {
    int ended = md_ring_ended(ring);
    int rc = md_ring_next(ring);
    if (rc == 0 && listens(ring) && !ended) {
        hook_clear(socket_of(ring));
        md_want(&ring->mine->wanted, ring->position + 8);
        ended = md_ring_ended(ring);
        rc = md_ring_next(ring);
    }
    CHECK(rc >= 0, "the consumer found %d", rc);
    return rc == 0 && ended ? -1 : rc;
}

static void consumer(void) {
    struct md_ring *ring = &RINGS[1];
    int held = 0, rc;
    if (listens(ring))
        md_ring_listen(ring);
    if (plan.wait_for)
        wait_until(ring, ring->position + (uint64_t)plan.wait_for * ENTRY);
    while ((rc = find(ring)) >= 0 && (!plan.leaves_after || TAKEN < plan.leaves_after)) {
        if (rc == 1) {
            CHECK(ring->entry == 8, "an entry of %llu bytes", (unsigned long long)ring->entry);
            uint64_t *at = (uint64_t *)(void *)md_ring_source(ring);
            uint64_t number = atomic_load_explicit(at, memory_order_relaxed);
            CHECK(number == (uint64_t)TAKEN, "entry %llu instead of %d",
                  (unsigned long long)number, TAKEN);
            TAKEN++;
            md_ring_drop(ring);
            if (++held < plan.batch)
                continue;
        }
        held = 0;
        md_ring_publish(ring);
        ring->rung = 0;
        if (rc == 0 && listens(ring))
            hook_poll(socket_of(ring));
        else if (rc == 0)
            wait_until(ring, ring->position + 1);
    }
    md_ring_close(ring);
    ring->rung = 0;
}

static int all_taken(void) {
    return TAKEN == (plan.leaves_after ? plan.leaves_after : plan.entries) && TAKEN <= PUT;
}

static const struct {
    const char *name;
    int long_form;
    struct plan plan;
} plans[] = {
    {"three entries through room for one", 0, {16, 3, 1, 0, 0, 0}},
    {"three entries through room for two", 0, {32, 3, 1, 0, 0, 0}},
    {"a batch of two, one more, room for two", 0, {32, 3, 2, 0, 0, 0}},
    {"the consumer waits for two", 0, {32, 2, 1, 0, 2, 0}},
    {"the consumer listens on a socket", 0, {32, 2, 1, 1, 0, 0}},
    {"the producer listens on a socket", 0, {16, 2, 1, 2, 0, 0}},
    {"the consumer leaves while the producer listens", 0, {16, 3, 1, 2, 0, 1}},
    {"the consumer leaves while the producer waits", 0, {16, 3, 1, 0, 0, 1}},
    {"six entries through room for one", 1, {16, 6, 1, 0, 0, 0}},
    {"six entries through room for two", 1, {32, 6, 1, 0, 0, 0}},
    {"seven entries, batches of two, room for three", 1, {48, 7, 2, 0, 0, 0}},
    {"nine entries, batches of three, room for four", 1, {64, 9, 3, 0, 0, 0}},
    {"six entries, the consumer listens", 1, {32, 6, 1, 1, 0, 0}},
    {"five entries, the producer listens", 1, {32, 5, 1, 2, 0, 0}},
    {"the consumer waits for four, and leaves after five of seven", 1, {64, 7, 1, 0, 4, 5}},
};

int main(int count, char **arguments) {
    int long_form = 0, failed = 0;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--long") == 0)
            long_form = 1;
        else if (strcmp(arguments[i], "--mutate") == 0 && i + 1 < count)
            mutation = arguments[++i];
        else
            return 2;
    }
    for (size_t i = 0; i < sizeof plans / sizeof plans[0] && !failed; i++) {
        if (plans[i].long_form > long_form)
            continue;
        plan = plans[i].plan;
        failed = explore(plans[i].name, begin, 2, (void (*const[])(void)){producer, consumer},
                         all_taken);
    }
    return failed;
}
