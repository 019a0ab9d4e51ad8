/* Fuzzes both ends of a ring (ring.h), over whose memory a hostile peer writes. See hostile.h.
 *
 * Checked, besides what the address sanitizer sees: no end is ever told of more than the area
 * holds; what an end was not told it does not use; while nobody was hostile, entries come out as
 * they went in, and nothing is called broken.
 */
#include "hostile.h"

#include "ring.h"

enum { PAGE = 4096, CAPACITY = PAGE, LINE = sizeof(struct md_ring_side), MOST = 4096 };

static unsigned char *memory; /* two pages, then the area twice */
static struct md_ring *ends[2];
static uint64_t put_in, taken; /* entries, while honest */

/* The producer's next entry is not sized by what it reads: both ends can tell it. */
static uint64_t sizes[MOST];

static struct md_ring_side *side(int which) {
    return (struct md_ring_side *)(void *)(memory + which * PAGE);
}

static void hostile_write(uint8_t what) {
    struct md_ring_side *it = side(what & 1);
    uint64_t near = ends[what & 1] ? ends[what & 1]->published : 0;
    switch (what >> 1) {
    case 0: it->position = next_value(near); break;
    case 1: it->wanted = next_value(near); break;
    case 2: it->bell = (uint32_t)next_byte(); break;
    case 3: it->closed = next_byte() & 1; break;
    case 4: side(0)->magic = next_value(MD_RING_MAGIC); break;
    default: { /* the area: sizes of entries, most of them where one begins */
        uint64_t at = what & 1 ? next_word(2) : ends[1] ? ends[1]->position : 0;
        uint64_t value = next_value(CAPACITY - 8);
        memcpy(memory + 2 * PAGE + at % CAPACITY / 8 * 8, &value, 8);
    }
    }
}

/* What an end knows by itself must hold whatever the other wrote. */
static void check(const struct md_ring *ring) {
    uint64_t apart = ring->producer ? ring->position - ring->limit : ring->limit - ring->position;
    MUST(ring->position % 8 == 0 && ring->limit % 8 == 0);
    MUST(ring->broken || apart <= ring->capacity);
    MUST(ring->capacity == CAPACITY && ring->data == memory + 2 * PAGE);
    MUST(ring->published <= ring->position);
    if (!ring->producer && ring->entry != MD_RING_NONE)
        MUST(ring->entry <= apart - MD_RING_HEADER);
}

static void begin(int which) {
    free(ends[which]);
    struct md_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        exit(3);
    ring->producer = which == 0;
    ring->mine = side(which);
    ring->theirs = side(1 - which);
    ring->data = memory + 2 * PAGE;
    ring->capacity = CAPACITY;
    ring->bell_fd = -1;
    ends[which] = ring;
    if (md_ring_begin(ring) < 0) {
        MUST(!honest);
        MUST(ring->broken);
    }
}

static void produce(struct md_ring *ring) {
    uint64_t size = next_byte() & 1 ? next_byte() : next_word(2);
    size %= CAPACITY - 8 + 1;
    int rc = md_ring_room(ring, size);
    if (rc != 1) {
        MUST(rc == 0 || (rc == -EPROTO && !honest));
        return;
    }
    memset(md_ring_target(ring), (int)(put_in & 255), size);
    md_ring_put(ring, size);
    if (honest)
        sizes[put_in++ % MOST] = size;
}

static void consume(struct md_ring *ring) {
    static unsigned char to[CAPACITY];
    int rc = md_ring_next(ring);
    if (rc != 1) {
        MUST(rc == 0 || (rc == -EPROTO && !honest));
        return;
    }
    hostile_turn();
    check(ring);
    MUST(ring->entry <= sizeof to - 8);
    uint64_t size = ring->entry;
    memcpy(to, md_ring_source(ring), size);
    hostile_turn();
    if (honest) {
        MUST(taken < put_in && size == sizes[taken % MOST]);
        for (uint64_t i = 0; i < size; i++)
            MUST(to[i] == (taken & 255));
        taken++;
    }
    md_ring_drop(ring);
}

static void step(void) {
    uint8_t what = next_byte();
    int which = what & 1;
    struct md_ring *ring = ends[which];
    switch (what >> 1 & 7) {
    case 0:
    case 1:
    case 2: which == 0 ? produce(ring) : consume(ring); break;
    case 3:
    case 4: md_ring_publish(ring); break;
    case 5: {
        struct md_wait wait = md_ring_wait(ring);
        int rc = md_sleep(&wait, next_value(ring->limit + 8), next_byte() * 64u,
                          next_byte() * 256u);
        MUST(rc == 0 || rc == -ETIMEDOUT || rc == -EINTR);
        break;
    }
    case 6:
        if (what & 16)
            md_want(&ring->mine->wanted, next_value(ring->limit + 8));
        else if (md_ring_look(ring) < 0)
            MUST(!honest);
        break;
    default:
        if (what & 16) {
            md_ring_close(ring);
        } else {
            honest = 0; /* what was not published is lost */
            begin(which);
            return;
        }
    }
    check(ring);
    if (ring->broken)
        begin(which);
}

static int one(const uint8_t *data, size_t length) {
    input = data;
    input_end = data + length;
    honest = 1;
    put_in = taken = hostile_clock = 0;
    memset(memory, 0, LINE);
    memset(memory + PAGE, 0, LINE);
    memset(memory + 2 * PAGE, 0, CAPACITY);
    side(0)->magic = MD_RING_MAGIC;
    side(0)->position = side(1)->position = 8 * next_word(2);
    begin(0);
    begin(1);
    while (input < input_end)
        step();
    return 0;
}

int main(int count, char **arguments) {
    memory = map_twice(2 * PAGE, CAPACITY);
    for (int i = 0; i < 2; i++) /* an end has no business there */
        __asan_poison_memory_region(memory + i * PAGE + LINE, PAGE - LINE);
    return LLVMFuzzerRunDriver(&count, &arguments, one);
}
