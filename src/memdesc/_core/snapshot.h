/* What snapshots need of the kernel and of the processor. Contract as in syscalls.h.
 *
 * Everything here is called without Python's lock: another thread may hold it while it waits
 * for a page that is write-protected below.
 */
#ifndef MEMDESC_SNAPSHOT_H
#define MEMDESC_SNAPSHOT_H

#include "syscalls.h"

#include <sys/ioctl.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#ifndef SYS_userfaultfd
#define SYS_userfaultfd 323 /* x86-64; the generic table has 282, as its headers say */
#endif

/* linux/userfaultfd.h, of which older headers lack parts. */
struct md_uffd_api { uint64_t api, features, ioctls; };
struct md_uffd_register { uint64_t start, len, mode, ioctls; };
struct md_uffd_writeprotect { uint64_t start, len, mode; };
struct md_uffd_range { uint64_t start, len; };
#define MD_UFFD_USER_MODE_ONLY 1
#define MD_UFFD_API_NUMBER 0xAAULL
#define MD_UFFD_FEATURES ((1ULL << 0) | (1ULL << 12)) /* PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM */
#define MD_UFFD_MODE_WP (1ULL << 1)
#define MD_UFFD_PROTECT (1ULL << 0)
#define MD_UFFDIO_API _IOWR(0xAA, 0x3F, struct md_uffd_api)
#define MD_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct md_uffd_register)
#define MD_UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct md_uffd_range)
#define MD_UFFDIO_WAKE _IOR(0xAA, 0x02, struct md_uffd_range)
#define MD_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct md_uffd_writeprotect)

#define MD_STREAM_FROM (256u << 10) /* bytes from which on the caches are passed by */

/* Replaces what lies at `to` by the mapping at `from`, in one step for every other thread. */
static inline long md_move(uintptr_t from, size_t length, uintptr_t to) {
    void *at = mremap((void *)from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to);
    return at == MAP_FAILED ? -(long)errno : 0;
}

static inline uint64_t md_word(const unsigned char *at) {
    return __atomic_load_n((const uint64_t *)(uintptr_t)at, __ATOMIC_RELAXED);
}

/* Copies so that each aligned word of the source is read at once: a store of up to 8 aligned
 * bytes by another thread is in the copy whole or not at all. A word of which only a part is
 * asked for is read whole too; it lies within the same page. */
static inline void md_copy_words(unsigned char *to, const unsigned char *from, size_t length) {
    size_t skip = (uintptr_t)from & 7;
    if (skip && length) {
        uint64_t word = md_word(from - skip);
        size_t part = 8 - skip < length ? 8 - skip : length;
        memcpy(to, (unsigned char *)&word + skip, part);
        to += part, from += part, length -= part;
    }
#if defined(__x86_64__)
    if (length >= MD_STREAM_FROM && !((uintptr_t)to & 7)) {
        for (; length >= 64; to += 64, from += 64, length -= 64)
            for (int i = 0; i < 64; i += 8)
                _mm_stream_si64((long long *)(to + i), (long long)md_word(from + i));
        _mm_sfence();
    }
#endif
    for (; length >= 8; to += 8, from += 8, length -= 8) {
        uint64_t word = md_word(from);
        memcpy(to, &word, 8);
    }
    if (length) {
        uint64_t word = md_word(from);
        memcpy(to, &word, length);
    }
}

/* A userfaultfd that is told of stores into a range: of all if this process may have that, else
 * of those by programs (a system call that stores there then answers EFAULT). */
static inline long md_watch_stores(uintptr_t address, size_t length) {
    struct md_uffd_api api = {MD_UFFD_API_NUMBER, MD_UFFD_FEATURES, 0};
    struct md_uffd_register range = {address, length, MD_UFFD_MODE_WP, 0};
    long fd = md_rc(syscall(SYS_userfaultfd, O_CLOEXEC));
    if (fd == -EPERM)
        fd = md_rc(syscall(SYS_userfaultfd, O_CLOEXEC | MD_UFFD_USER_MODE_ONLY));
    if (fd < 0)
        return fd;
    if (ioctl((int)fd, MD_UFFDIO_API, &api) || ioctl((int)fd, MD_UFFDIO_REGISTER, &range)) {
        long rc = -(long)errno;
        close((int)fd);
        return rc;
    }
    return fd;
}

/* Copies `nbytes` at `view` into the memory at `from`, then puts that memory in its place. Given
 * a userfaultfd, stores into the view wait meanwhile, and then go to the new memory. On an error
 * the view is as it was. Nobody waits any more when this returns. */
static inline long md_exchange(int watch, uintptr_t from, size_t length, uintptr_t view,
                               size_t nbytes) {
    struct md_uffd_writeprotect protect = {view, length, MD_UFFD_PROTECT};
    struct md_uffd_range range = {view, length};
    long rc = 0;
    if (watch >= 0)
        rc = md_rc(ioctl(watch, MD_UFFDIO_WRITEPROTECT, &protect));
    if (!rc) {
        md_copy_words((unsigned char *)from, (const unsigned char *)view, nbytes);
        rc = md_move(from, length, view);
    }
    if (watch >= 0) /* what was moved away is registered no longer */
        ioctl(watch, rc ? MD_UFFDIO_UNREGISTER : MD_UFFDIO_WAKE, &range);
    return rc;
}

#endif
