/* Offers (offers.h) between a publisher and two subscribers, threads, for the thread sanitizer.
 *
 *   threads_offers SECONDS SEED
 *
 * Round after round with another pool: policies, depths, sizes and pauses at random. Each slot is
 * full of its sequence number; a subscriber checks that of every slot all over, twice. In the end
 * each had every slot or as many less as were taken back, and all slots are free.
 */
#include "common.h"

#include <pthread.h>
#ifdef WEAK /* to see that the sanitizer would tell */
#include <stdatomic.h>
#define memory_order_release memory_order_relaxed
#endif
#include "offers.h"

enum { PAGE = 4096, TURNS = 1500, LINES = 2, MOST = 64, STRIDE = 64, HEADERS = MOST * STRIDE,
       CONTROL = LINES * PAGE + HEADERS };

static struct md_pool pool;
static struct md_line lines[LINES];
static struct md_taker takers[LINES];
static unsigned char *memory; /* the lines, the headers, then the slots (once would do) */
static uint64_t seed, total, slot_size;

static unsigned char *slot_at(uint32_t slot) {
    return memory + CONTROL + slot * slot_size;
}

static void bad(const char *what, uint64_t number) {
    fprintf(stderr, "%s: %llu\n", what, (unsigned long long)number);
    exit(6);
}

static void sleep_until(const struct md_wait *wait, uint64_t wanted, uint64_t *chance) {
    if (md_sleep(wait, wanted, next_random(chance) % 3 * 2000, 5000000000) == -ETIMEDOUT)
        bad("a lost waking: 5 s asleep for", wanted);
}

static uint32_t loan(uint64_t *chance) {
    uint32_t slot = 0;
    int rc;
    while ((rc = md_pool_loan(&pool, &slot)) == -EAGAIN) {
        struct md_line *line = md_pool_blocked(&pool);
        struct md_wait wait = md_line_wait(line);
        sleep_until(&wait, md_pool_awaited(&pool, line), chance);
    }
    if (rc < 0)
        bad("md_pool_loan", (uint64_t)-rc);
    return slot;
}

static void *publish(void *unused) {
    uint64_t chance = seed + 1;
    for (uint64_t turn = 1; turn <= TURNS; turn++) {
        uint32_t slot = loan(&chance);
        uint64_t nbytes = next_random(&chance) % (slot_size + 1);
        memset(slot_at(slot), (int)(turn & 255), nbytes);
        md_pool_publish(&pool, slot, nbytes, &turn, sizeof turn);
        if (next_random(&chance) % 64 == 0)
            usleep(50);
    }
    for (int i = 0; i < LINES; i++)
        md_line_farewell(&lines[i]);
    return unused;
}

static void check(const struct md_taken *taken) {
    const unsigned char *at = slot_at(taken->slot);
    for (uint64_t i = 0; i < taken->nbytes; i++)
        if (at[i] != (taken->sequence & 255))
            bad("a slot shows another one's bytes", taken->sequence);
}

static void *subscribe(void *number) {
    struct md_taker *taker = number;
    struct md_wait wait = md_taker_wait(taker);
    struct md_taken held[4];
    uint32_t holding = 0;
    uint64_t chance = seed + 2 + (uint64_t)(taker - takers);
    for (;;) {
        int ended = md_taker_ended(taker) != 0;
        int rc = md_taker_take(taker, &held[holding]);
        if (rc == -EPROTO)
            bad("md_taker_take", EPROTO);
        if (rc == 0 && ended)
            break;
        if (rc == 0 && md_taker_pending(taker) == 0)
            sleep_until(&wait, taker->read + 1, &chance);
        if (rc != 1)
            continue;
        check(&held[holding++]);
        if (next_random(&chance) % 64 == 0)
            usleep(50);
        while (holding && (holding == taker->loans || next_random(&chance) % 2)) {
            check(&held[--holding]);
            md_taker_give(taker, held[holding].slot, held[holding].sequence);
        }
    }
    while (holding--)
        md_taker_give(taker, held[holding].slot, held[holding].sequence);
    md_taker_close(taker);
    return NULL;
}

static void begin(void) {
    uint64_t chance = seed;
    slot_size = 8 << next_random(&chance) % 10; /* 4096 at most */
    memory = map_twice(CONTROL, MOST * 4096);
    memset(&pool, 0, sizeof pool);
    uint32_t depths[LINES], loans[LINES], slots = 2;
    for (int i = 0; i < LINES; i++) {
        depths[i] = 1 + (uint32_t)(next_random(&chance) % 8);
        loans[i] = 1 + (uint32_t)(next_random(&chance) % 3);
        slots += depths[i] + loans[i];
    }
    if (md_pool_begin(&pool, memory + LINES * PAGE, STRIDE, slots, 1) < 0)
        exit(3);
    for (int i = 0; i < LINES; i++) {
        struct md_offers *shared = (struct md_offers *)(void *)(memory + i * PAGE);
        struct md_cell *cells = md_offers_cells(shared, slots);
        lines[i] = (struct md_line){.shared = shared, .cells = cells, .bell_fd = -1};
        lines[i].depth = depths[i];
        lines[i].loans = loans[i];
        lines[i].policy = next_random(&chance) % 2 ? MD_BLOCK : MD_DROP_OLDEST;
        lines[i].offered = calloc(depths[i], sizeof *lines[i].offered);
        lines[i].held = calloc(loans[i], sizeof *lines[i].held);
        takers[i] = (struct md_taker){.shared = shared, .cells = cells, .slots = slots};
        takers[i].headers = memory + LINES * PAGE;
        takers[i].header_size = STRIDE;
        takers[i].metadata_limit = STRIDE - sizeof(struct md_slot_header);
        takers[i].slot_size = slot_size;
        takers[i].depth = depths[i];
        takers[i].loans = loans[i];
        if (lines[i].offered == NULL || lines[i].held == NULL ||
            md_pool_add(&pool, &lines[i], 0) < 0)
            exit(3);
    }
}

static void finish(void) {
    md_pool_refresh(&pool);
    for (int i = 0; i < LINES; i++) {
        if (lines[i].state != MD_LINE_GONE)
            bad("a line that is not done with", (uint64_t)i);
        if (takers[i].taken + lines[i].dropped != TURNS ||
            (lines[i].policy == MD_BLOCK && lines[i].dropped))
            bad("slots were lost, beside", lines[i].dropped);
        total += takers[i].taken;
        free(lines[i].offered);
        free(lines[i].held);
    }
    if (pool.free_count != pool.slots - 1)
        bad("free slots", pool.free_count);
    md_pool_clear(&pool);
    unmap_twice(memory, CONTROL, MOST * 4096);
}

int main(int count, char **arguments) {
    if (count != 3)
        return 2;
    uint64_t end = md_now() + (uint64_t)(atof(arguments[1]) * 1e9), rounds = 0;
    seed = strtoull(arguments[2], NULL, 10);
    do {
        begin();
        pthread_t threads[LINES + 1];
        for (int i = 0; i <= LINES; i++)
            if (pthread_create(&threads[i], NULL, i ? subscribe : publish,
                               i ? &takers[i - 1] : NULL))
                return 3;
        for (int i = 0; i <= LINES; i++)
            pthread_join(threads[i], NULL);
        finish();
        seed = next_random(&seed);
        rounds++;
    } while (md_now() < end);
    printf("%llu slots taken in %llu rounds\n", (unsigned long long)total,
           (unsigned long long)rounds);
    return 0;
}
