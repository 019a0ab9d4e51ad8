/* The element list of a zone: chunks of memory cut into slots, and a list of the free ones.
 *
 * What is known of a slot (its state, its place in the list) lies apart from the elements, so
 * nothing that is read out of element memory is ever trusted. A free slot is zero in its whole
 * stride; that it still is, is checked when it is taken. The list is last in, first out.
 *
 * A chunk is retired when its memory goes back to the kernel: its slots leave the list, its
 * addresses stay. Reviving it puts them back; its memory must read as zero by then.
 *
 * Contract: the caller holds a lock (Python's) around every call. Nothing here maps memory,
 * logs, or needs Python: this header compiles alone (`gcc -std=gnu11 -fsyntax-only`). A function
 * that can fail gives 0 or -errno. Taking and giving are constant in the number of slots.
 */
#ifndef MEMDESC_ZONE_H
#define MEMDESC_ZONE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What a slot's entry holds while no element is in it; else the number of its allocation. */
#define MD_SLOT_FREE ((uint64_t)0)
#define MD_SLOT_QUARANTINED UINT64_MAX

struct md_slot {
    uint32_t chunk, index;
};

struct md_chunk {
    unsigned char *base;
    uint32_t slots;
    uint32_t used; /* slots that are not free: living or quarantined */
    int retired;
    uint64_t entries[];
};

struct md_zone {
    size_t element_size, stride;
    struct md_chunk **chunks;
    uint32_t chunk_count, retired_count;
    struct md_slot *free; /* has room for every slot of every chunk */
    size_t free_count, slot_count;
    uint64_t allocs, frees, drops, quarantined;
    size_t living, peak_living;
};

/* The first byte that is not zero; `length` where all are. */
static inline size_t md_first_nonzero(const unsigned char *at, size_t length) {
    size_t done = 0;
    uint64_t word[8];
    for (; length - done >= sizeof word; done += sizeof word) {
        memcpy(word, at + done, sizeof word);
        if ((word[0] | word[1] | word[2] | word[3]) | (word[4] | word[5] | word[6] | word[7]))
            break;
    }
    while (done < length && at[done] == 0)
        done++;
    return done;
}

static inline unsigned char *md_slot_address(const struct md_zone *zone, struct md_slot slot) {
    return zone->chunks[slot.chunk]->base + slot.index * zone->stride;
}

static inline void md_zone_put_slots(struct md_zone *zone, uint32_t number) {
    /* In falling order: the lowest address is taken first. */
    for (uint32_t index = zone->chunks[number]->slots; index-- > 0;)
        zone->free[zone->free_count++] = (struct md_slot){number, index};
}

/* Add a chunk of `slots` slots at `base`; its memory reads as zero. */
static inline int md_zone_add(struct md_zone *zone, unsigned char *base, uint32_t slots) {
    struct md_chunk *chunk = calloc(1, sizeof *chunk + slots * sizeof chunk->entries[0]);
    if (chunk == NULL)
        return -ENOMEM;
    struct md_chunk **chunks =
        realloc(zone->chunks, (zone->chunk_count + (size_t)1) * sizeof *chunks);
    if (chunks != NULL)
        zone->chunks = chunks;
    struct md_slot *list = realloc(zone->free, (zone->slot_count + slots) * sizeof *list);
    if (list != NULL)
        zone->free = list;
    if (chunks == NULL || list == NULL) {
        free(chunk);
        return -ENOMEM;
    }
    chunk->base = base;
    chunk->slots = slots;
    zone->chunks[zone->chunk_count] = chunk;
    zone->slot_count += slots;
    md_zone_put_slots(zone, zone->chunk_count++);
    return 0;
}

/* Take a free slot. 0: taken, zero in its whole stride. -ENOENT: none is free. -EUCLEAN: the
 * slot was written to while it was free; it is quarantined, and `*where` is the first byte. */
static inline int md_zone_take(struct md_zone *zone, struct md_slot *slot, size_t *where) {
    if (zone->free_count == 0)
        return -ENOENT;
    *slot = zone->free[--zone->free_count];
    struct md_chunk *chunk = zone->chunks[slot->chunk];
    chunk->used++;
    *where = md_first_nonzero(md_slot_address(zone, *slot), zone->stride);
    if (*where != zone->stride) {
        chunk->entries[slot->index] = MD_SLOT_QUARANTINED;
        zone->quarantined++;
        return -EUCLEAN;
    }
    chunk->entries[slot->index] = ++zone->allocs;
    if (++zone->living > zone->peak_living)
        zone->peak_living = zone->living;
    return 0;
}

/* Clear an element and put its slot on the list; the caller counts whether freed or dropped. */
static inline void md_zone_give(struct md_zone *zone, struct md_slot slot) {
    struct md_chunk *chunk = zone->chunks[slot.chunk];
    memset(md_slot_address(zone, slot), 0, zone->element_size);
    chunk->entries[slot.index] = MD_SLOT_FREE;
    chunk->used--;
    zone->living--;
    zone->free[zone->free_count++] = slot;
}

/* The slot whose stride an address lies in: 0, or -ENOENT. */
static inline int md_zone_find(const struct md_zone *zone, uintptr_t address,
                               struct md_slot *slot) {
    for (uint32_t number = 0; number < zone->chunk_count; number++) {
        const struct md_chunk *chunk = zone->chunks[number];
        uintptr_t base = (uintptr_t)chunk->base;
        if (address >= base && address - base < chunk->slots * zone->stride) {
            *slot = (struct md_slot){number, (uint32_t)((address - base) / zone->stride)};
            return 0;
        }
    }
    return -ENOENT;
}

/* Retire every chunk that no slot of is in use; give how many that were. */
static inline uint32_t md_zone_retire(struct md_zone *zone) {
    uint32_t retired = 0;
    for (uint32_t number = 0; number < zone->chunk_count; number++)
        if (zone->chunks[number]->used == 0 && !zone->chunks[number]->retired)
            retired += zone->chunks[number]->retired = 1;
    size_t kept = 0;
    for (size_t i = 0; retired && i < zone->free_count; i++)
        if (!zone->chunks[zone->free[i].chunk]->retired)
            zone->free[kept++] = zone->free[i];
    if (retired)
        zone->free_count = kept;
    zone->retired_count += retired;
    return retired;
}

/* Put a retired chunk's slots back on the list. 0, or -EINVAL where it is not retired. */
static inline int md_zone_revive(struct md_zone *zone, uint32_t number) {
    if (!zone->chunks[number]->retired)
        return -EINVAL;
    zone->chunks[number]->retired = 0;
    zone->retired_count--;
    md_zone_put_slots(zone, number);
    return 0;
}

static inline void md_zone_clear(struct md_zone *zone) {
    for (uint32_t number = 0; number < zone->chunk_count; number++)
        free(zone->chunks[number]);
    free(zone->chunks);
    free(zone->free);
    memset(zone, 0, sizeof *zone);
}

#endif
