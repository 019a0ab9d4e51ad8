/* The least that C can do to wake a sleeper: 64 bytes beside a futex, there and back. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct side {
    _Atomic uint32_t number;
    char pad[60];
    char data[64];
};

long sleeps; /* how often this process has slept */

static long futex(struct side *side, int op, uint32_t value) {
    return syscall(SYS_futex, &side->number, op, value, NULL, NULL, 0);
}

static long put(struct side *side, uint32_t number, const char *message) {
    memcpy(side->data, message, sizeof side->data);
    atomic_store(&side->number, number);
    return futex(side, FUTEX_WAKE, INT_MAX);
}

static long take(struct side *side, uint32_t number, char *message) {
    while (atomic_load(&side->number) != number) {
        if (futex(side, FUTEX_WAIT, number - 1) == 0)
            sleeps++;
        else if (errno != EAGAIN && errno != EINTR)
            return -1;
    }
    memcpy(message, side->data, sizeof side->data);
    return 0;
}

/* Messages are numbered from `first`; 0, or -1 where the kernel refuses. */
int ask(struct side *sides, uint32_t first, uint32_t count) {
    char message[64] = {0};
    for (uint32_t number = first; number < first + count; number++)
        if (put(&sides[0], number, message) < 0 || take(&sides[1], number, message) < 0)
            return -1;
    return 0;
}

int answer(struct side *sides, uint32_t first, uint32_t count) {
    char message[64];
    for (uint32_t number = first; number < first + count; number++)
        if (take(&sides[0], number, message) < 0 || put(&sides[1], number, message) < 0)
            return -1;
    return 0;
}
