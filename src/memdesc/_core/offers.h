/* Slots of a pool, offered by one publisher to subscribers who do not trust it, nor it them. What
 * lies where in the shared memory: `memdesc/streams/layout.py`.
 *
 * The pool's slots are the publisher's: subscribers see them read-only. With each subscriber it
 * shares one small piece of memory, a line: a queue of offers that overflows. The publisher puts
 * offers in; each one is taken out either by the subscriber, who then holds the slot, or again by
 * the publisher, who wants it back. Both move the same position, `read`, by compare-and-swap, so
 * exactly one of them has each offer, and nobody ever waits for the other or for a lock.
 *
 * A cell is written again only after its offer was taken out, and positions only grow. So who moved
 * `read` past an offer has read its cell whole, whatever he read before in vain.
 *
 * What the publisher relies on (which slot is offered to whom, held by whom, free) it keeps in its
 * private memory. Of what a subscriber writes, `read` and `released`, each value is read once and
 * must be possible; else that subscriber is broken, and its slots come back. A subscriber checks
 * in the same way what the publisher writes.
 *
 * Waking: waking.h.
 *
 * Contract: the caller sees to it that one thread at a time is in a pool or a taker, but for
 * md_sleep, which touches `wanted` alone. This header compiles alone.
 */
#ifndef MEMDESC_OFFERS_H
#define MEMDESC_OFFERS_H

#include "waking.h"

#include <stdlib.h>
#include <string.h>

#define MD_OFFERS_MAGIC UINT64_C(0x315246464f53444d) /* "MDSOFFR1" */
#define MD_OFFERS_LAST (UINT64_MAX >> 1)             /* no position is beyond */
#define MD_NO_SLOT UINT32_MAX

/* Why the publisher is done with a line. */
enum { MD_ENDED_CLOSED = 1, MD_ENDED_SLOW = 2, MD_ENDED_BROKEN = 3, MD_ENDED_DROPPED = 4 };

enum { MD_DROP_OLDEST = 0, MD_BLOCK = 1, MD_DROP_NEWEST = 2, MD_DISCONNECT = 3 };

/* Before the slots, one for each; written by the publisher before the slot is offered. */
struct md_slot_header {
    uint64_t sequence, timestamp, nbytes, metadata; /* the last: how many bytes follow */
    unsigned char data[];
};

struct md_cell {
    _Atomic uint64_t sequence, slot;
};

/* The start of a line. */
struct md_offers {
    /* The publisher's. */
    _Atomic uint64_t written; /* offers ever put in */
    _Atomic uint64_t wanted;  /* value of `read` that is to wake the publisher; 0: none */
    _Atomic uint32_t bell;    /* futex: changes when the publisher wakes the subscriber */
    _Atomic uint32_t ended;   /* not 0: the publisher is done, and why */
    uint64_t magic;
    _Alignas(64) _Atomic uint64_t read; /* offers ever taken out, by either */
    /* The subscriber's. */
    _Alignas(64) _Atomic uint64_t subscriber_wanted; /* value of `written` that is to wake him */
    _Atomic uint32_t subscriber_bell;
    _Atomic uint32_t subscriber_ended;
    /* Then: released[slots], the sequence with which each was last given back; md_cell[depth]. */
    _Alignas(64) _Atomic uint64_t released[];
};
_Static_assert(sizeof(struct md_offers) == 192, "three cache lines");
_Static_assert(sizeof(struct md_cell) == 16, "two words");

static inline size_t md_offers_size(uint32_t slots, uint32_t depth) {
    return sizeof(struct md_offers) + slots * sizeof(uint64_t) + depth * sizeof(struct md_cell);
}

static inline struct md_cell *md_offers_cells(struct md_offers *shared, uint32_t slots) {
    return (struct md_cell *)(shared->released + slots);
}

/* --- The publisher ------------------------------------------------------------------------ */

struct md_offer {
    uint64_t sequence;
    uint32_t slot;
};

enum { MD_LINE_OPEN = 1, MD_LINE_LEAVING = 2, MD_LINE_GONE = 3 };

/* What the publisher knows of one subscriber. */
struct md_line {
    struct md_offers *shared;
    struct md_cell *cells;
    struct md_offer *offered; /* [depth]: its own copy of the cells */
    struct md_offer *held;    /* [loans]: taken, and not yet seen to be given back */
    uint64_t written, read;
    uint32_t depth, loans, holding;
    int policy, state, ended;
    int bell_fd;
    _Atomic int gone; /* whoever waits for it is to look again */
    uint64_t offers, dropped, rung, sleeps;
};

struct md_pool {
    unsigned char *headers;
    size_t header_size;
    uint32_t slots, loans, most_loans; /* loans: slots being filled */
    uint32_t *users;                   /* [slots]: who has it: subscribers, a loan, the latest */
    uint32_t *free, free_count; /* last in, first out: what was read last is still in the caches */
    uint32_t latest;
    uint64_t sequence, latest_sequence;
    struct md_line **lines;
    uint32_t line_count;
    uint32_t events; /* lines that ended since somebody looked */
    uint64_t published, discarded, nbytes, dropped; /* dropped: of all lines that there ever were */
};

static inline int md_pool_begin(struct md_pool *pool, unsigned char *headers, size_t header_size,
                                uint32_t slots, uint32_t most_loans) {
    pool->users = calloc(slots, sizeof *pool->users);
    pool->free = calloc(slots, sizeof *pool->free);
    if (pool->users == NULL || pool->free == NULL)
        return -ENOMEM;
    pool->headers = headers;
    pool->header_size = header_size;
    pool->slots = slots;
    pool->most_loans = most_loans;
    pool->latest = MD_NO_SLOT;
    for (uint32_t slot = slots; slot-- > 0;)
        pool->free[pool->free_count++] = slot;
    return 0;
}

static inline void md_pool_clear(struct md_pool *pool) {
    free(pool->users);
    free(pool->free);
    free(pool->lines);
    memset(pool, 0, sizeof *pool);
}

static inline struct md_slot_header *md_pool_header(struct md_pool *pool, uint32_t slot) {
    return (struct md_slot_header *)(pool->headers + slot * pool->header_size);
}

static inline void md_pool_unuse(struct md_pool *pool, uint32_t slot) {
    if (--pool->users[slot] == 0)
        pool->free[pool->free_count++] = slot;
}

/* What the publisher waits for, of one subscriber: that it takes offers out, or leaves. */
static inline struct md_wait md_line_wait(struct md_line *line) {
    struct md_offers *shared = line->shared;
    return (struct md_wait){&shared->read,             &shared->wanted, &shared->subscriber_bell,
                            &shared->subscriber_ended, &line->gone,     &line->sleeps};
}

/* Slots that nobody can take back from the subscribers, at most; with one more of that policy.
 *
 * What is offered by BLOCK and DISCONNECT is what was published last, the same for all of them. */
static inline uint64_t md_pool_reserved(const struct md_pool *pool, int policy, uint32_t depth,
                                        uint32_t loans) {
    uint64_t sum = loans + (policy == MD_DROP_NEWEST ? depth : 0);
    uint64_t last = policy == MD_BLOCK || policy == MD_DISCONNECT ? depth : 0;
    for (uint32_t index = 0; index < pool->line_count; index++) {
        const struct md_line *line = pool->lines[index];
        if (line->state == MD_LINE_LEAVING)
            sum += line->holding;
        if (line->state != MD_LINE_OPEN)
            continue;
        sum += line->loans + (line->policy == MD_DROP_NEWEST ? (uint64_t)line->depth : 0);
        if ((line->policy == MD_BLOCK || line->policy == MD_DISCONNECT) && line->depth > last)
            last = line->depth;
    }
    return sum + last;
}

/* Take back what a line has given back since the last look. */
static inline void md_line_sweep(struct md_pool *pool, struct md_line *line) {
    for (uint32_t index = 0; index < line->holding;) {
        struct md_offer held = line->held[index];
        if (atomic_load_explicit(&line->shared->released[held.slot], memory_order_acquire) !=
            held.sequence) {
            index++;
            continue;
        }
        line->held[index] = line->held[--line->holding];
        md_pool_unuse(pool, held.slot);
    }
}

/* See what a subscriber took and gave back. 0, or -EPROTO: it wrote what can not be. */
static inline int md_line_look(struct md_pool *pool, struct md_line *line) {
    uint64_t read = atomic_load_explicit(&line->shared->read, memory_order_acquire);
    if (read < line->read || read > line->written)
        return -EPROTO;
    for (; line->read != read; line->read++) {
        if (line->holding == line->loans)
            md_line_sweep(pool, line);
        if (line->holding == line->loans)
            return -EPROTO; /* it holds more than was agreed */
        line->held[line->holding++] = line->offered[line->read % line->depth];
    }
    md_line_sweep(pool, line);
    return 0;
}

/* Take the oldest offer back: 1; 0: it was taken meanwhile; -EPROTO. */
static inline int md_line_revoke(struct md_pool *pool, struct md_line *line) {
    uint64_t read = line->read;
    if (atomic_compare_exchange_strong(&line->shared->read, &read, line->read + 1)) {
        md_pool_unuse(pool, line->offered[line->read % line->depth].slot);
        line->read++;
        return 1;
    }
    read = line->read;
    int rc = md_line_look(pool, line);
    return rc < 0 || line->read == read ? -EPROTO : 0;
}

/* Tell a subscriber that it gets nothing any more, and who waits for it. */
static inline void md_line_tell_end(struct md_line *line) {
    atomic_store_explicit(&line->shared->ended, (uint32_t)line->ended, memory_order_seq_cst);
    atomic_store_explicit(&line->gone, 1, memory_order_seq_cst);
    line->rung++;
    md_wake(&line->shared->bell, line->bell_fd);
    md_stir(&line->shared->subscriber_bell);
}

/* Be done with a line: tell the subscriber why. With `keep`, what it holds stays its own until it
 * is given back; without, all of it comes back now. */
static inline void md_line_end(struct md_pool *pool, struct md_line *line, int ended, int keep) {
    if (line->state == MD_LINE_GONE)
        return;
    if (line->state == MD_LINE_OPEN)
        line->ended = ended;
    while (keep && line->read != line->written)
        keep = md_line_revoke(pool, line) >= 0;
    if (keep && line->holding) {
        line->state = MD_LINE_LEAVING;
    } else {
        for (; line->read != line->written; line->read++)
            md_pool_unuse(pool, line->offered[line->read % line->depth].slot);
        while (line->holding)
            md_pool_unuse(pool, line->held[--line->holding].slot);
        line->state = MD_LINE_GONE;
    }
    pool->events++;
    md_line_tell_end(line);
}

/* The stream ends: what was offered can still be taken, as no slot is filled any more. */
static inline void md_line_farewell(struct md_line *line) {
    if (line->state == MD_LINE_OPEN)
        line->ended = MD_ENDED_CLOSED;
    md_line_tell_end(line);
}

/* Bring the books of a line up to date, or be done with it. */
static inline void md_line_refresh(struct md_pool *pool, struct md_line *line) {
    if (line->state == MD_LINE_GONE)
        return;
    int leaves = atomic_load_explicit(&line->shared->subscriber_ended, memory_order_acquire) != 0;
    if (md_line_look(pool, line) < 0)
        md_line_end(pool, line, MD_ENDED_BROKEN, 0);
    else if (line->state == MD_LINE_LEAVING ? !line->holding : leaves)
        md_line_end(pool, line, MD_ENDED_CLOSED, 1);
}

static inline void md_pool_refresh(struct md_pool *pool) {
    for (uint32_t index = 0; index < pool->line_count; index++)
        md_line_refresh(pool, pool->lines[index]);
}

/* Put an offer in; there is room. */
static inline void md_line_put(struct md_pool *pool, struct md_line *line, uint32_t slot,
                               uint64_t sequence) {
    uint32_t at = (uint32_t)(line->written % line->depth);
    atomic_store_explicit(&line->cells[at].sequence, sequence, memory_order_relaxed);
    atomic_store_explicit(&line->cells[at].slot, slot, memory_order_relaxed);
    line->offered[at] = (struct md_offer){sequence, slot};
    pool->users[slot]++;
    line->offers++;
    line->written++;
    atomic_store_explicit(&line->shared->written, line->written, memory_order_release);
}

/* Take the oldest offer back of who is too slow; as md_line_revoke. */
static inline int md_line_drop_oldest(struct md_pool *pool, struct md_line *line) {
    int rc = md_line_revoke(pool, line);
    if (rc > 0) {
        line->dropped++;
        pool->dropped++;
    }
    return rc;
}

/* Have room for an offer, as the line's policy says: 1, or 0 where it gets none. */
static inline int md_line_make_room(struct md_pool *pool, struct md_line *line) {
    while (line->state == MD_LINE_OPEN && line->written - line->read == line->depth) {
        uint64_t read = line->read;
        if (md_line_look(pool, line) < 0) {
            md_line_end(pool, line, MD_ENDED_BROKEN, 0);
        } else if (line->read != read) {
            continue;
        } else if (line->policy == MD_DISCONNECT) {
            md_line_end(pool, line, MD_ENDED_SLOW, 1);
        } else if (line->policy != MD_DROP_OLDEST) {
            line->dropped++; /* MD_BLOCK: never, as a loan waits for room */
            pool->dropped++;
            return 0;
        } else if (md_line_drop_oldest(pool, line) < 0) {
            md_line_end(pool, line, MD_ENDED_BROKEN, 0);
        }
    }
    return line->state == MD_LINE_OPEN;
}

/* Add a line that begins with nothing in it, and offer it the latest where it may have that. */
static inline int md_pool_add(struct md_pool *pool, struct md_line *line, int latest) {
    struct md_line **lines =
        realloc(pool->lines, (pool->line_count + (size_t)1) * sizeof *pool->lines);
    if (lines == NULL)
        return -ENOMEM;
    pool->lines = lines;
    lines[pool->line_count++] = line;
    line->state = MD_LINE_OPEN;
    if (latest && pool->latest != MD_NO_SLOT)
        md_line_put(pool, line, pool->latest, pool->latest_sequence);
    return 0;
}

static inline void md_pool_remove(struct md_pool *pool, struct md_line *line) {
    for (uint32_t index = 0; index < pool->line_count; index++) {
        if (pool->lines[index] == line) {
            pool->lines[index] = pool->lines[--pool->line_count];
            return;
        }
    }
}

/* The subscriber of policy BLOCK who has no room for what is being filled and one more. */
static inline struct md_line *md_pool_blocked(struct md_pool *pool) {
    for (uint32_t index = 0; index < pool->line_count; index++) {
        struct md_line *line = pool->lines[index];
        if (line->state == MD_LINE_OPEN && line->policy == MD_BLOCK &&
            line->depth - (line->written - line->read) <= pool->loans)
            return line;
    }
    return NULL;
}

/* The value of `read` at which it has room. */
static inline uint64_t md_pool_awaited(struct md_pool *pool, struct md_line *line) {
    return line->written + pool->loans + 1 - line->depth;
}

/* Take the oldest offer that may be taken back from anybody. */
static inline int md_pool_reclaim(struct md_pool *pool) {
    struct md_line *oldest = NULL;
    uint64_t least = UINT64_MAX;
    for (uint32_t index = 0; index < pool->line_count; index++) {
        struct md_line *line = pool->lines[index];
        if (line->state != MD_LINE_OPEN || line->policy != MD_DROP_OLDEST ||
            line->read == line->written)
            continue;
        uint64_t sequence = line->offered[line->read % line->depth].sequence;
        if (sequence < least) {
            least = sequence;
            oldest = line;
        }
    }
    if (oldest == NULL)
        return -ENOBUFS; /* never, by what is reserved for each line */
    if (md_line_drop_oldest(pool, oldest) < 0)
        md_line_end(pool, oldest, MD_ENDED_BROKEN, 0);
    return 0;
}

/* A slot to fill: 0. -EAGAIN: a subscriber has no room (md_pool_blocked). -ENOBUFS: as many are
 * being filled as may be. */
static inline int md_pool_loan(struct md_pool *pool, uint32_t *slot) {
    if (pool->loans == pool->most_loans)
        return -ENOBUFS;
    if (pool->free_count == 0 || md_pool_blocked(pool) != NULL) {
        md_pool_refresh(pool); /* not each time: it costs cache misses, and the books never lie */
        if (md_pool_blocked(pool) != NULL)
            return -EAGAIN;
        while (pool->free_count == 0)
            if (md_pool_reclaim(pool) < 0)
                return -ENOBUFS;
    }
    *slot = pool->free[--pool->free_count];
    pool->users[*slot] = 1;
    pool->loans++;
    return 0;
}

static inline void md_pool_discard(struct md_pool *pool, uint32_t slot) {
    pool->loans--;
    pool->discarded++;
    md_pool_unuse(pool, slot);
}

/* Offer a slot that was filled to all. */
static inline void md_pool_publish(struct md_pool *pool, uint32_t slot, uint64_t nbytes,
                                   const void *metadata, size_t metadata_size) {
    struct md_slot_header *header = md_pool_header(pool, slot);
    uint64_t sequence = ++pool->sequence;
    header->sequence = sequence;
    header->timestamp = md_now();
    header->nbytes = nbytes;
    header->metadata = metadata_size;
    if (metadata_size)
        memcpy(header->data, metadata, metadata_size);
    for (uint32_t index = 0; index < pool->line_count; index++)
        if (md_line_make_room(pool, pool->lines[index]))
            md_line_put(pool, pool->lines[index], slot, sequence);
    if (pool->latest != MD_NO_SLOT)
        md_pool_unuse(pool, pool->latest);
    pool->latest = slot; /* the loan's use of it goes on */
    pool->latest_sequence = sequence;
    pool->loans--;
    pool->published++;
    pool->nbytes += nbytes;
    atomic_thread_fence(memory_order_seq_cst);
    for (uint32_t index = 0; index < pool->line_count; index++) {
        struct md_line *line = pool->lines[index];
        if (atomic_load_explicit(&line->shared->subscriber_wanted, memory_order_relaxed) ==
                line->written &&
            line->state == MD_LINE_OPEN && line->written &&
            line->offered[(line->written - 1) % line->depth].sequence == sequence) {
            line->rung++;
            md_wake(&line->shared->bell, line->bell_fd);
        }
    }
}

/* --- The subscriber ----------------------------------------------------------------------- */

struct md_taker {
    struct md_offers *shared;
    struct md_cell *cells;
    const unsigned char *headers;
    size_t header_size, metadata_limit, slot_size;
    uint32_t slots, depth, loans, holding;
    uint64_t sequence; /* of the last that was taken */
    uint64_t read;     /* as last seen */
    int broken;
    _Atomic int gone; /* the publisher is known to have ended, or this end was closed */
    uint64_t taken, missed, nbytes, rung, sleeps;
};

/* What was taken. */
struct md_taken {
    uint32_t slot;
    uint64_t sequence, timestamp, nbytes, metadata;
};

static inline int md_taker_break(struct md_taker *taker) {
    taker->broken = 1;
    return -EPROTO;
}

/* How many offers there are: 0 or more, or -EPROTO. The count may be stale. */
static inline int64_t md_taker_pending(struct md_taker *taker) {
    uint64_t read = atomic_load_explicit(&taker->shared->read, memory_order_acquire);
    uint64_t written = atomic_load_explicit(&taker->shared->written, memory_order_acquire);
    if (taker->broken || read < taker->read || written < read || written > MD_OFFERS_LAST)
        return md_taker_break(taker);
    taker->read = read;
    return (int64_t)(written - read);
}

/* Take the oldest offer: 1, 0: there is none, -EPROTO, or -EAGAIN: others were quicker, again. */
static inline int md_taker_take(struct md_taker *taker, struct md_taken *taken) {
    for (int attempt = 0; attempt < 64; attempt++) {
        int64_t pending = md_taker_pending(taker);
        if (pending <= 0)
            return (int)pending;
        uint64_t read = taker->read;
        struct md_cell *cell = taker->cells + read % taker->depth;
        uint64_t sequence = atomic_load_explicit(&cell->sequence, memory_order_relaxed);
        uint64_t slot = atomic_load_explicit(&cell->slot, memory_order_relaxed);
        if (!atomic_compare_exchange_strong(&taker->shared->read, &read, read + 1))
            continue;
        taker->read++;
        if (atomic_load_explicit(&taker->shared->wanted, memory_order_seq_cst) == taker->read) {
            taker->rung++;
            md_wake(&taker->shared->subscriber_bell, -1);
        }
        if (slot >= taker->slots || sequence <= taker->sequence)
            return md_taker_break(taker);
        const struct md_slot_header *header =
            (const struct md_slot_header *)(taker->headers + slot * taker->header_size);
        *taken = (struct md_taken){
            .slot = (uint32_t)slot,
            .sequence = sequence,
            .timestamp = *(const volatile uint64_t *)&header->timestamp,
            .nbytes = *(const volatile uint64_t *)&header->nbytes,
            .metadata = *(const volatile uint64_t *)&header->metadata,
        };
        if (*(const volatile uint64_t *)&header->sequence != sequence ||
            taken->nbytes > taker->slot_size || taken->metadata > taker->metadata_limit)
            return md_taker_break(taker);
        if (taker->sequence)
            taker->missed += sequence - taker->sequence - 1;
        taker->sequence = sequence;
        taker->taken++;
        taker->nbytes += taken->nbytes;
        taker->holding++;
        return 1;
    }
    return -EAGAIN;
}

static inline void md_taker_give(struct md_taker *taker, uint32_t slot, uint64_t sequence) {
    taker->holding--;
    atomic_store_explicit(&taker->shared->released[slot], sequence, memory_order_release);
}

/* What a subscriber waits for: that something is offered, or the publisher is done. */
static inline struct md_wait md_taker_wait(struct md_taker *taker) {
    struct md_offers *shared = taker->shared;
    return (struct md_wait){&shared->written, &shared->subscriber_wanted, &shared->bell,
                            &shared->ended,   &taker->gone,               &taker->sleeps};
}

/* Why the publisher is done, or 0. */
static inline uint32_t md_taker_ended(struct md_taker *taker) {
    return atomic_load_explicit(&taker->shared->ended, memory_order_acquire);
}

static inline void md_taker_want(struct md_taker *taker) {
    uint64_t written = atomic_load_explicit(&taker->shared->written, memory_order_acquire);
    md_want(&taker->shared->subscriber_wanted, written + 1);
}

static inline void md_taker_close(struct md_taker *taker) {
    atomic_store_explicit(&taker->shared->subscriber_ended, 1, memory_order_seq_cst);
    md_wake(&taker->shared->subscriber_bell, -1);
}

/* Have this end's own waiters look. */
static inline void md_taker_stop(struct md_taker *taker) {
    atomic_store_explicit(&taker->gone, 1, memory_order_seq_cst);
    md_stir(&taker->shared->bell);
}

#endif
