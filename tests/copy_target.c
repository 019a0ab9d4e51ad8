/* A task to copy from and to. It knows nothing of the library.
 *
 * argv[1] is a number of pages. It maps them, private and writable, between pages without any
 * access, fills byte i with (i * 7 + i / 251) % 256, and prints "ADDRESS". Then it obeys:
 *   r ADDRESS LENGTH      read own memory: prints "COUNT HEX"
 *   w ADDRESS HEX         write own memory: prints "COUNT"
 *   p ADDRESS LENGTH PROT mprotect           u ADDRESS LENGTH  munmap
 *   h                     hide from all who may not trace every task (not dumpable)
 * Counts are of the bytes before the first that can not be reached.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

static unsigned char buffer[1 << 20];
static char line[(2 << 20) + 64];

int main(int argc, char **argv) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t length = (argc > 1 ? strtoul(argv[1], NULL, 10) : 1) * page;
    unsigned char *room = mmap(NULL, length + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *at = room + page;
    if (room == MAP_FAILED || mprotect(at, length, PROT_READ | PROT_WRITE))
        return 1;
    for (size_t i = 0; i < length; i++)
        at[i] = (unsigned char)(i * 7 + i / 251);
    printf("%lu\n", (unsigned long)(uintptr_t)at);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        unsigned long address = 0, size = 0;
        int prot = 0, where = 0;
        ssize_t count = 0;
        sscanf(line + 1, "%lu %n", &address, &where);
        struct iovec mine = {buffer, 0}, theirs = {(void *)address, 0};
        switch (line[0]) {
        case 'r':
            sscanf(line + 1 + where, "%lu", &size);
            mine.iov_len = theirs.iov_len = size < sizeof buffer ? size : sizeof buffer;
            count = process_vm_readv(getpid(), &mine, 1, &theirs, 1, 0);
            printf("%zd ", count < 0 ? 0 : count);
            for (ssize_t i = 0; i < count; i++)
                printf("%02x", buffer[i]);
            putchar('\n');
            break;
        case 'w':
            for (char *hex = line + 1 + where; sscanf(hex, "%2hhx", &buffer[size]) == 1; hex += 2)
                size++;
            mine.iov_len = theirs.iov_len = size;
            count = process_vm_writev(getpid(), &mine, 1, &theirs, 1, 0);
            printf("%zd\n", count < 0 ? 0 : count);
            break;
        case 'p':
            sscanf(line + 1 + where, "%lu %d", &size, &prot);
            printf("%d\n", mprotect((void *)address, size, prot));
            break;
        case 'u':
            sscanf(line + 1 + where, "%lu", &size);
            printf("%d\n", munmap((void *)address, size));
            break;
        case 'h':
            printf("%d\n", prctl(PR_SET_DUMPABLE, 0));
            break;
        }
        fflush(stdout);
    }
    return 0;
}
