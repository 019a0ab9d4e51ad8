/* What the programs here have in common: random numbers, and memory mapped twice in a row. */
#ifndef LOCKFREE_COMMON_H
#define LOCKFREE_COMMON_H

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* splitmix64: the next of a sequence that any thread can compute for itself. */
static inline uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static inline void die(const char *what) {
    perror(what);
    exit(3);
}

#if defined(__GNUC__) && !defined(__clang__)
/* Fences order nothing for gcc's thread sanitizer. Here they guard sleeping alone, which explore_*
 * tests; what the entries need is the release and the acquire of the positions. */
#pragma GCC diagnostic ignored "-Wtsan"
#endif

enum { GUARD = 1 << 20 };

/* `control` bytes, then `area` bytes twice in a row, of one memfd, between two guards. */
static inline unsigned char *map_twice(size_t control, size_t area) {
    int fd = memfd_create("lockfree", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)(control + area)) < 0)
        die("memfd_create");
    unsigned char *base = mmap(NULL, control + 2 * area + 2 * GUARD, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        die("mmap");
    base += GUARD;
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_FIXED;
    if (mmap(base, control + area, prot, flags, fd, 0) == MAP_FAILED ||
        mmap(base + control + area, area, prot, flags, fd, (off_t)control) == MAP_FAILED)
        die("mmap");
    close(fd);
    return base;
}

static inline void unmap_twice(unsigned char *base, size_t control, size_t area) {
    munmap(base - GUARD, control + 2 * area + 2 * GUARD);
}

#endif
