/* The ring (ring.h) between two threads, for the thread sanitizer.
 *
 *   threads_ring SECONDS SEED
 *
 * Round after round with another ring: sizes, batches and pauses at random. Both threads compute
 * the same sequence of sizes and bytes, so an entry lost, doubled or torn is one that differs.
 */
#include "common.h"

#include <pthread.h>
#include <string.h>
#ifdef WEAK /* to see that the sanitizer would tell */
#include <stdatomic.h>
#define memory_order_release memory_order_relaxed
#endif
#include "ring.h"

enum { PAGE = 4096, ENTRIES = 3000 };

static struct md_ring ends[2];
static unsigned char *memory;
static uint64_t capacity, seed, total;

static uint64_t size_of(uint64_t *sequence, uint64_t largest) {
    uint64_t kind = next_random(sequence) % 16, size = next_random(sequence);
    return kind == 0 ? largest - size % 8 : kind < 4 ? size % largest : size % 64;
}

static void fill(unsigned char *at, uint64_t size, uint64_t number) {
    for (uint64_t i = 0; i < size; i++)
        at[i] = (unsigned char)(number * 31 + i);
}

static void sleep_until(struct md_ring *ring, uint64_t wanted, uint64_t *chance) {
    uint64_t spin = next_random(chance) % 3 * 2000;
    struct md_wait wait = md_ring_wait(ring);
    int rc = md_sleep(&wait, wanted, spin, 5000000000);
    if (rc == -ETIMEDOUT) {
        fprintf(stderr, "a lost waking: 5 s asleep\n");
        exit(4);
    }
}

static void *produce(void *unused) {
    struct md_ring *ring = &ends[0];
    uint64_t sequence = seed, chance = seed + 1;
    for (uint64_t number = 0; number < ENTRIES;) {
        uint64_t batch = 1 + next_random(&chance) % 8;
        for (; batch && number < ENTRIES; batch--, number++) {
            uint64_t size = size_of(&sequence, capacity - 8);
            int rc;
            while ((rc = md_ring_room(ring, size)) == 0) {
                md_ring_publish(ring);
                sleep_until(ring, ring->position + md_ring_extent(size) - capacity, &chance);
            }
            if (rc < 0)
                exit(5);
            fill(md_ring_target(ring), size, number);
            md_ring_put(ring, size);
        }
        md_ring_publish(ring);
        if (next_random(&chance) % 64 == 0)
            usleep(50);
    }
    md_ring_close(ring);
    return unused;
}

static void *consume(void *unused) {
    struct md_ring *ring = &ends[1];
    uint64_t sequence = seed, chance = seed + 2, number = 0;
    static unsigned char expected[64 * PAGE];
    for (;;) {
        uint64_t batch = 1 + next_random(&chance) % 8;
        int ended = 0, rc = 1;
        while (batch-- && (ended = md_ring_ended(ring), rc = md_ring_next(ring)) == 1) {
            uint64_t size = size_of(&sequence, capacity - 8);
            fill(expected, size, number++);
            if (ring->entry != size || memcmp(md_ring_source(ring), expected, size)) {
                fprintf(stderr, "entry %llu is not what was put in\n", (unsigned long long)number);
                exit(6);
            }
            md_ring_drop(ring);
        }
        md_ring_publish(ring);
        if (rc < 0)
            exit(5);
        if (rc == 0 && ended)
            break;
        if (rc == 0)
            sleep_until(ring, ring->position + 1, &chance);
        else if (next_random(&chance) % 64 == 0)
            usleep(50);
    }
    if (number != ENTRIES)
        exit(7);
    total += number;
    md_ring_close(ring);
    return unused;
}

int main(int count, char **arguments) {
    if (count != 3)
        return 2;
    uint64_t end = md_now() + (uint64_t)(atof(arguments[1]) * 1e9);
    seed = strtoull(arguments[2], NULL, 10);
    uint64_t rounds = 0;
    do {
        uint64_t chance = seed;
        capacity = PAGE << next_random(&chance) % 4;
        memory = map_twice(2 * PAGE, capacity);
        for (int i = 0; i < 2; i++) {
            ends[i] = (struct md_ring){.producer = i == 0, .capacity = capacity, .bell_fd = -1};
            ends[i].mine = (struct md_ring_side *)(void *)(memory + i * PAGE);
            ends[i].theirs = (struct md_ring_side *)(void *)(memory + (1 - i) * PAGE);
            ends[i].data = memory + 2 * PAGE;
            if (md_ring_begin(&ends[i]) < 0)
                return 5;
        }
        pthread_t threads[2];
        if (pthread_create(&threads[0], NULL, produce, NULL) ||
            pthread_create(&threads[1], NULL, consume, NULL))
            return 3;
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        unmap_twice(memory, 2 * PAGE, capacity);
        seed = next_random(&seed);
        rounds++;
    } while (md_now() < end);
    printf("%llu entries in %llu rounds, %llu sleeps in the last\n", (unsigned long long)total,
           (unsigned long long)rounds, (unsigned long long)(ends[0].sleeps + ends[1].sleeps));
    return 0;
}
