/* Fuzzes the publisher and the subscriber of a stream (offers.h), over whose shared memory a
 * hostile peer writes. See hostile.h.
 *
 * Checked, besides what the address sanitizer sees: the publisher's books stay whole whatever
 * subscribers write (every slot is free, or used by as many as say so; none twice; none by more
 * than were agreed); a subscriber is shown no slot that is not there, nor more bytes than one has.
 */
#include "hostile.h"

#include "offers.h"

enum { PAGE = 4096, SLOTS = 12, LINES = 2, LOANS = 2, HEADER = 64, SLOT = 128, FILLING = 2 };

static unsigned char *shared; /* a page for each line */
static unsigned char *slots;  /* headers, then the slots */
static struct md_pool pool;
static struct md_line *lines[LINES]; /* NULL: gone */
static struct md_taker *takers[LINES];
static struct md_taken held[LINES][LOANS];
static uint32_t filling[FILLING], filled;

static struct md_offers *line_at(int which) {
    return (struct md_offers *)(void *)(shared + which * PAGE);
}

static void hostile_write(uint8_t what) {
    int which = what & 1;
    struct md_offers *it = line_at(which);
    struct md_line *line = lines[which];
    uint64_t written = line ? line->written : 0, read = line ? line->read : 0;
    uint32_t depth = line ? line->depth : 1;
    switch (what >> 1) {
    case 0:
    case 1: it->read = next_value(read); break;
    case 2: it->written = next_value(written); break;
    case 3: it->released[next_byte() % SLOTS] = next_value(pool.sequence); break;
    case 4: md_offers_cells(it, SLOTS)[next_byte() % depth].slot = next_value(0); break;
    case 5: md_offers_cells(it, SLOTS)[next_byte() % depth].sequence = next_value(pool.sequence); break;
    case 6: it->subscriber_ended = next_byte() & 1; break;
    case 7: it->ended = next_byte() & 3; break;
    case 8: it->subscriber_wanted = next_value(written); break;
    case 9: it->wanted = next_value(read); break;
    default: { /* a publisher's headers, as a subscriber sees them */
        uint64_t value = next_value(pool.sequence);
        memcpy(slots + next_byte() % (SLOTS * HEADER / 8) * 8, &value, 8);
    }
    }
}

static void check_books(void) {
    uint32_t users[SLOTS] = {0}, free_slots = 0;
    for (uint32_t i = 0; i < filled; i++)
        users[filling[i]]++;
    if (pool.latest != MD_NO_SLOT)
        users[pool.latest]++;
    for (uint32_t i = 0; i < pool.line_count; i++) {
        const struct md_line *line = pool.lines[i];
        MUST(line->holding <= line->loans && line->written - line->read <= line->depth);
        MUST(line->state != MD_LINE_GONE || (!line->holding && line->read == line->written));
        for (uint64_t at = line->read; at != line->written; at++)
            users[line->offered[at % line->depth].slot]++;
        for (uint32_t at = 0; at < line->holding; at++)
            users[line->held[at].slot]++;
    }
    MUST(pool.free_count <= SLOTS && pool.loans == filled);
    for (uint32_t i = 0; i < SLOTS; i++) {
        MUST(pool.users[i] == users[i]);
        free_slots += users[i] == 0;
    }
    MUST(free_slots == pool.free_count);
    for (uint32_t i = 0; i < pool.free_count; i++) {
        uint32_t slot = pool.free[i];
        MUST(slot < SLOTS && users[slot] == 0);
        users[slot] = 1; /* so that none is there twice */
    }
}

static void forget(int which) {
    if (lines[which] == NULL)
        return;
    md_pool_remove(&pool, lines[which]);
    free(lines[which]->offered);
    free(lines[which]->held);
    free(lines[which]);
    free(takers[which]);
    lines[which] = NULL;
    takers[which] = NULL;
}

static void *zeros(size_t count, size_t size) {
    void *made = calloc(count, size);
    if (made == NULL)
        exit(3);
    return made;
}

static void join(int which) {
    uint8_t how = next_byte();
    uint32_t depth = 1 + (how >> 2) % 3;
    memset(line_at(which), 0, md_offers_size(SLOTS, depth));
    struct md_line *line = lines[which] = zeros(1, sizeof *line);
    struct md_taker *taker = takers[which] = zeros(1, sizeof *taker);
    line->shared = taker->shared = line_at(which);
    line->cells = taker->cells = md_offers_cells(line_at(which), SLOTS);
    line->depth = taker->depth = depth;
    line->loans = taker->loans = LOANS;
    line->policy = how & 3;
    line->bell_fd = -1;
    line->offered = zeros(depth, sizeof *line->offered);
    line->held = zeros(LOANS, sizeof *line->held);
    taker->headers = slots;
    taker->header_size = HEADER;
    taker->metadata_limit = HEADER - sizeof(struct md_slot_header);
    taker->slot_size = SLOT;
    taker->slots = SLOTS;
    if (md_pool_add(&pool, line, how & 32) < 0)
        exit(3);
}

static void publish(void) {
    uint8_t what = next_byte();
    if (filled && what & 1) {
        uint32_t slot = filling[--filled];
        unsigned char metadata[HEADER] = {0};
        uint64_t size = next_byte() % (SLOT + 1);
        memset(slots + SLOTS * HEADER + slot * SLOT, what, size);
        if (what & 2)
            md_pool_discard(&pool, slot);
        else
            md_pool_publish(&pool, slot, size, metadata, next_byte() % 32);
        return;
    }
    uint32_t slot = MD_NO_SLOT;
    int rc = md_pool_loan(&pool, &slot);
    if (rc == 0) {
        MUST(slot < SLOTS);
        filling[filled++] = slot;
    } else if (rc == -EAGAIN) {
        struct md_line *line = md_pool_blocked(&pool);
        MUST(line != NULL);
        struct md_wait wait = md_line_wait(line);
        md_sleep(&wait, md_pool_awaited(&pool, line), 2000, 4000);
    } else {
        MUST(rc == -ENOBUFS && filled == FILLING);
    }
}

static void take(int which) {
    struct md_taker *taker = takers[which];
    if (taker->holding == LOANS || taker->broken)
        return;
    struct md_taken *taken = &held[which][taker->holding];
    uint64_t last = taker->sequence;
    int rc = md_taker_take(taker, taken);
    MUST(rc == 0 || rc == 1 || rc == -EPROTO || rc == -EAGAIN);
    if (rc != 1) {
        MUST(rc != -EPROTO || (!honest && taker->broken));
        return;
    }
    MUST(taken->slot < SLOTS && taken->nbytes <= SLOT && taken->sequence > last);
    MUST(taken->metadata <= HEADER - sizeof(struct md_slot_header));
}

static void give(int which) {
    struct md_taker *taker = takers[which];
    if (taker->holding == 0)
        return;
    struct md_taken *taken = &held[which][taker->holding - 1];
    md_taker_give(taker, taken->slot, taken->sequence);
}

static void subscriber_waits(int which) {
    struct md_taker *taker = takers[which];
    int64_t pending = md_taker_pending(taker);
    MUST(pending >= 0 || !honest);
    if (pending < 0)
        return;
    struct md_wait wait = md_taker_wait(taker);
    md_sleep(&wait, taker->read + 1, 2000, 4000);
}

static void step(void) {
    uint8_t what = next_byte();
    int which = what & 1;
    if (lines[which] != NULL && lines[which]->state == MD_LINE_GONE)
        forget(which);
    if (lines[which] == NULL) {
        join(which);
    } else {
        switch (what >> 1 & 15) {
        case 0: md_pool_refresh(&pool); break;
        case 1: subscriber_waits(which); break;
        case 2: md_taker_want(takers[which]); break;
        case 3: md_taker_close(takers[which]); break;
        case 4:
            md_line_refresh(&pool, lines[which]);
            md_line_end(&pool, lines[which], MD_ENDED_DROPPED, what & 32);
            break;
        case 5:
        case 6:
        case 7: give(which); break;
        case 8:
        case 9:
        case 10: take(which); break;
        default: publish();
        }
    }
    check_books();
}

static int one(const uint8_t *data, size_t length) {
    input = data;
    input_end = data + length;
    honest = 1;
    hostile_clock = 0;
    filled = 0;
    memset(slots, 0, SLOTS * (HEADER + SLOT));
    if (md_pool_begin(&pool, slots, HEADER, SLOTS, FILLING) < 0)
        exit(3);
    while (input < input_end)
        step();
    for (int i = 0; i < LINES; i++)
        forget(i);
    md_pool_clear(&pool);
    return 0;
}

int main(int count, char **arguments) {
    shared = map_twice(LINES * PAGE, PAGE);
    for (int i = 0; i < LINES; i++) /* what no line of these slots reaches to */
        __asan_poison_memory_region(shared + i * PAGE + md_offers_size(SLOTS, 3),
                                    PAGE - md_offers_size(SLOTS, 3));
    slots = zeros(SLOTS, HEADER + SLOT);
    return LLVMFuzzerRunDriver(&count, &arguments, one);
}
