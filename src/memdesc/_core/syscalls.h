/* The system calls that the standard library lacks, one static inline each.
 *
 * Contract of every function here: it returns the call's result (>= 0), or
 * -errno. It decides nothing, allocates nothing, logs nothing and needs no
 * Python: this header compiles alone (`gcc -std=gnu11 -fsyntax-only`).
 */
#ifndef MEMDESC_SYSCALLS_H
#define MEMDESC_SYSCALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

/* Numbers that older C libraries' headers do not have (asm-generic/unistd.h). */
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static inline long md_rc(long rc) { return rc < 0 ? -(long)errno : rc; }

/* A user address is below 2^63, so a negative result is always an errno. */
static inline long md_mmap(uintptr_t address, size_t length, int prot, int flags, int fd,
                           int64_t offset) {
    void *at = mmap((void *)address, length, prot, flags, fd, (off_t)offset);
    return at == MAP_FAILED ? -(long)errno : (long)(uintptr_t)at;
}

static inline long md_munmap(uintptr_t address, size_t length) {
    return md_rc(munmap((void *)address, length));
}

static inline long md_mprotect(uintptr_t address, size_t length, int prot) {
    return md_rc(mprotect((void *)address, length, prot));
}

static inline long md_madvise(uintptr_t address, size_t length, int advice) {
    return md_rc(madvise((void *)address, length, advice));
}

static inline long md_mlock(uintptr_t address, size_t length) {
    return md_rc(mlock((void *)address, length));
}

static inline long md_munlock(uintptr_t address, size_t length) {
    return md_rc(munlock((void *)address, length));
}

static inline long md_page_size(void) { return sysconf(_SC_PAGESIZE); }

static inline long md_mincore(uintptr_t address, size_t length, unsigned char *pages) {
    return md_rc(mincore((void *)address, length, pages));
}

/* mremap with an old size of 0 makes a second mapping of a shared range
 * (mremap(2), "old_size zero"); EINVAL for private memory and for hugetlb. */
static inline long md_duplicate(uintptr_t address, size_t length) {
    void *at = mremap((void *)address, 0, length, MREMAP_MAYMOVE);
    return at == MAP_FAILED ? -(long)errno : (long)(uintptr_t)at;
}

static inline long md_process_vm_readv(int pid, void *local, size_t length, uintptr_t remote) {
    struct iovec mine = {local, length}, theirs = {(void *)remote, length};
    return md_rc(process_vm_readv(pid, &mine, 1, &theirs, 1, 0));
}

static inline long md_process_vm_writev(int pid, void *local, size_t length, uintptr_t remote) {
    struct iovec mine = {local, length}, theirs = {(void *)remote, length};
    return md_rc(process_vm_writev(pid, &mine, 1, &theirs, 1, 0));
}

static inline long md_pidfd_getfd(int pidfd, int fd) {
    return md_rc(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

/* What is known of a file, or of what a path leads to, without asking for it: of a file that is
 * served by another process (FUSE, a network) what was last heard. So it never waits for that
 * one, where stat(2) does. An empty path means the descriptor. Device, inode, mode, bytes, blocks
 * of 512 bytes. */
static inline long md_stat_cached(int fd, const char *path, uint64_t *told) {
    struct statx found;
    const unsigned wanted = STATX_TYPE | STATX_MODE | STATX_INO | STATX_SIZE | STATX_BLOCKS;
    long rc = statx(fd, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT | AT_EMPTY_PATH, wanted, &found);
    if (rc < 0)
        return -(long)errno;
    told[0] = makedev(found.stx_dev_major, found.stx_dev_minor);
    told[1] = found.stx_ino;
    told[2] = found.stx_mode;
    told[3] = found.stx_size;
    told[4] = found.stx_blocks;
    return 0;
}

static inline long md_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    return md_rc(fallocate(fd, mode, (off_t)offset, (off_t)length));
}

/* Names private anonymous memory in /proc/PID/maps: `[anon:name]`. Linux 5.17, and a kernel
 * built with it (CONFIG_ANON_VMA_NAME); EINVAL elsewhere. */
static inline long md_name(uintptr_t address, size_t length, const char *name) {
    return md_rc(prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, address, length, name));
}

#endif
