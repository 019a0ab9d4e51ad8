/* Offers (offers.h) in every interleaving of short programs; see explore.h.
 *
 *   explore_offers [--long] [--mutate FUNCTION:ACCESS]
 *
 * A publisher fills slots with the number of the turn; subscribers check each word of what they
 * hold. In the end each had every slot, or as many less as were taken back from it, in order; and
 * the publisher's books say that all slots are free.
 */
#define SHARED 1024
#define PRIVATE 2048
#include "explore.h"

/* The publisher's books are a part of the state too. */
static void *allocate(size_t length);
#define calloc(count, size) allocate((count) * (size))
#define realloc(old, length) ((old) != NULL ? (old) : allocate(64))
#define free(pointer) (void)(pointer)
#include "offers.h"
#undef calloc
#undef realloc
#undef free

enum { LINES = 2, SLOTS = 5, WORDS = 2, BLOCK = 48, LINE = 320 };

static struct plan {
    int lines, turns, depth, policy;
    int keeps;  /* slots that a subscriber holds on to before it gives the first back */
    int leaves; /* slots after which a subscriber leaves; 0: never */
    int listens;
    int recounts; /* a subscriber asks anew for how many there are when it wants one more */
} plan;

static struct books {
    struct md_pool pool;
    struct md_line lines[LINES];
    struct md_taker takers[LINES];
    size_t used;
} *const books = (struct books *)(void *)world.private;
_Static_assert(sizeof(struct books) <= 1280, "room");

static void *allocate(size_t length) {
    void *at = world.private + sizeof(struct books) + books->used;
    books->used += (length + 15) & ~(size_t)15;
    if (sizeof(struct books) + books->used > PRIVATE)
        exit(3);
    return at;
}

static struct md_offers *line_at(int line) {
    return (struct md_offers *)(void *)(world.shared + line * LINE);
}

static unsigned char *slots_at(void) { return world.shared + LINES * LINE; }
_Static_assert(LINES * LINE + SLOTS * BLOCK <= SHARED - 16, "room");

static int socket_of(int line) { return SHARED - 8 + 4 * line; }

static uint64_t *words_of(uint32_t slot) {
    return (uint64_t *)(void *)(slots_at() + slot * BLOCK + sizeof(struct md_slot_header));
}

static void begin(void) {
    if (md_offers_size(SLOTS, (uint32_t)plan.depth) > LINE ||
        md_pool_begin(&books->pool, slots_at(), BLOCK, SLOTS, 1) < 0)
        exit(3);
    for (int i = 0; i < plan.lines; i++) {
        struct md_line *line = &books->lines[i];
        struct md_taker *taker = &books->takers[i];
        line->shared = taker->shared = line_at(i);
        line->cells = taker->cells = md_offers_cells(line_at(i), SLOTS);
        line->depth = taker->depth = (uint32_t)plan.depth;
        line->loans = taker->loans = (uint32_t)plan.keeps + 1;
        line->offered = allocate(line->depth * sizeof *line->offered);
        line->held = allocate(line->loans * sizeof *line->held);
        line->policy = plan.policy;
        line->bell_fd = plan.listens ? socket_of(i) : -1;
        taker->headers = slots_at();
        taker->header_size = BLOCK;
        taker->slot_size = WORDS * 8;
        taker->slots = SLOTS;
        if (md_pool_add(&books->pool, line, 0) < 0)
            exit(3);
    }
}

static void wait_until(const struct md_wait *wait, uint64_t wanted) {
    int rc = md_sleep(wait, wanted, 0, 1000000000);
    CHECK(rc == 0, "md_sleep gave %d", rc);
    *wait->sleeps = 0;
}

static uint32_t loan(void) {
    uint32_t slot = 0;
    int rc;
    while ((rc = md_pool_loan(&books->pool, &slot)) == -EAGAIN) {
        struct md_line *line = md_pool_blocked(&books->pool);
        struct md_wait wait = md_line_wait(line);
        wait_until(&wait, md_pool_awaited(&books->pool, line));
    }
    CHECK(rc == 0, "md_pool_loan gave %d", rc);
    return slot;
}

static void publisher(void) {
    for (int turn = 1; turn <= plan.turns; turn++) {
        uint32_t slot = loan();
        for (int i = 0; i < WORDS; i++)
            atomic_store_explicit(&words_of(slot)[i], (uint64_t)turn, memory_order_relaxed);
        md_pool_publish(&books->pool, slot, WORDS * 8, NULL, 0);
    }
    for (int i = 0; i < plan.lines; i++)
        md_line_farewell(&books->lines[i]);
    for (int i = 0; i < plan.lines; i++)
        books->lines[i].rung = 0;
}

static void check_held(const struct md_taken *held) {
    for (int i = 0; i < WORDS; i++) {
        uint64_t word = atomic_load_explicit(&words_of(held->slot)[i], memory_order_relaxed);
        CHECK(word == held->sequence, "slot %d shows %llu instead of %llu", held->slot,
              (unsigned long long)word, (unsigned long long)held->sequence);
    }
}

static void sleep_for(struct md_taker *taker, int number) {
    int64_t pending = md_taker_pending(taker);
    CHECK(pending >= 0, "md_taker_pending gave %d", (int)pending);
    struct md_offers *shared = taker->shared;
    struct md_wait wait = md_taker_wait(taker);
    if (pending)
        return;
    if (plan.listens)
        hook_poll(socket_of(number));
    else if (plan.recounts)
        wait_until(&wait, 1 + atomic_load_explicit(&shared->written, memory_order_acquire));
    else
        wait_until(&wait, taker->read + 1);
}

/* As StreamSubscriber.take: 1, 0: none now, -1: the publisher is done. */
static int find(struct md_taker *taker, struct md_taken *taken, int number) {
    int ended = md_taker_ended(taker) != 0, rc = md_taker_take(taker, taken);
    if (rc == 0 && plan.listens && !ended) {
        hook_clear(socket_of(number));
        md_taker_want(taker);
        ended = md_taker_ended(taker) != 0;
        rc = md_taker_take(taker, taken);
    }
    CHECK(rc >= 0 || rc == -EAGAIN, "md_taker_take gave %d", rc);
    taker->rung = 0;
    return rc == 0 && ended ? -1 : rc == -EAGAIN ? 0 : rc;
}

static void subscribe(int number) {
    struct md_taker *taker = &books->takers[number];
    struct md_taken held[4];
    int holding = 0, rc;
    uint64_t before = 0;
    while ((rc = find(taker, &held[holding], number)) >= 0) {
        if (rc == 0) {
            sleep_for(taker, number);
            continue;
        }
        CHECK(held[holding].sequence > before, "a slot came twice, or late");
        before = held[holding++].sequence;
        if (holding > plan.keeps) {
            check_held(&held[0]);
            md_taker_give(taker, held[0].slot, held[0].sequence);
            holding--;
            for (int i = 0; i < holding; i++)
                held[i] = held[i + 1];
        }
        if (plan.leaves && (int)taker->taken == plan.leaves)
            break;
    }
    for (int i = 0; i < holding; i++) {
        check_held(&held[i]);
        md_taker_give(taker, held[i].slot, held[i].sequence);
    }
    md_taker_close(taker);
    taker->rung = 0;
}

static void first(void) { subscribe(0); }
static void second(void) { subscribe(1); }

/* What every line had, and that all slots came back but the latest. */
static int all_accounted_for(void) {
    self = NULL; /* no other thread is left: what follows is done at once */
    md_pool_refresh(&books->pool);
    for (int i = 0; i < plan.lines; i++) {
        const struct md_line *line = &books->lines[i];
        const struct md_taker *taker = &books->takers[i];
        if (line->state != MD_LINE_GONE || taker->holding)
            return 0;
        if (plan.leaves)
            continue;
        if (taker->taken + line->dropped != (uint64_t)plan.turns ||
            taker->sequence != (uint64_t)plan.turns)
            return 0;
        if (plan.policy == MD_BLOCK && line->dropped)
            return 0;
    }
    return books->pool.free_count == SLOTS - 1 && books->pool.loans == 0;
}

static const struct {
    const char *name;
    int long_form;
    struct plan plan;
} plans[] = {
    {"the oldest of one is dropped", 0, {1, 2, 1, MD_DROP_OLDEST, 0, 0, 0, 0}},
    {"the publisher waits for one", 0, {1, 2, 1, MD_BLOCK, 0, 0, 0, 0}},
    {"a subscriber leaves while the publisher waits", 0, {1, 2, 1, MD_BLOCK, 0, 1, 0, 0}},
    {"a subscriber listens on a socket", 0, {1, 2, 1, MD_DROP_OLDEST, 0, 0, 1, 0}},
    {"the oldest of two is dropped, one is kept", 1, {1, 3, 2, MD_DROP_OLDEST, 1, 0, 0, 0}},
    {"the oldest of one is dropped, three turns", 1, {1, 3, 1, MD_DROP_OLDEST, 0, 0, 0, 0}},
    {"the oldest of one is dropped, four turns", 1, {1, 4, 1, MD_DROP_OLDEST, 0, 0, 0, 0}},
    {"the oldest of two is dropped, four turns", 1, {1, 4, 2, MD_DROP_OLDEST, 1, 0, 0, 0}},
    {"the publisher waits for one, four turns", 1, {1, 4, 1, MD_BLOCK, 0, 0, 0, 0}},
    {"the publisher waits for two, four turns", 1, {1, 4, 2, MD_BLOCK, 0, 0, 0, 0}},
    {"a subscriber listens, four turns", 1, {1, 4, 2, MD_DROP_OLDEST, 0, 0, 1, 0}},
    {"a subscriber leaves after two of four", 1, {1, 4, 2, MD_DROP_OLDEST, 1, 2, 0, 0}},
    {"two subscribers, one turn", 1, {2, 1, 1, MD_DROP_OLDEST, 0, 0, 0, 0}},
};

int main(int count, char **arguments) {
    int long_form = 0, recounts = 0, failed = 0;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--long") == 0)
            long_form = 1;
        else if (strcmp(arguments[i], "--mutate") == 0 && i + 1 < count)
            mutation = arguments[++i];
        else
            return 2;
    }
    recounts = strcmp(mutation, "sleep_for:once") == 0;
    for (size_t i = 0; i < sizeof plans / sizeof plans[0] && !failed; i++) {
        if (plans[i].long_form > long_form)
            continue;
        plan = plans[i].plan;
        plan.recounts = recounts;
        failed = explore(plans[i].name, begin, 1 + plan.lines,
                         (void (*const[])(void)){publisher, first, second}, all_accounted_for);
    }
    return failed;
}
