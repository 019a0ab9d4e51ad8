// Listing 2 as it stands, in a program that knows nothing of memdesc. What is added: main(), two
// kinds of memory that can not be mapped as one VM object, and a loop that keeps it alive: for each
// line of its input it prints what its buffer says.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/mman.h>

static void print_others(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    // From malloc: private memory.
    uint8_t *small = malloc(54321);
    strcpy((char *)small, "malloc");
    printf("malloc'ed memory is @ %p\n", (void *)small);

    // Two shared mappings side by side: two VM objects.
    uint8_t *two = mmap(NULL, 2 * page, PROT_NONE, MAP_ANON | MAP_PRIVATE, -1, 0);
    for (int i = 0; i < 2; i++) {
        mmap(two + i * page, page, PROT_READ | PROT_WRITE, MAP_ANON | MAP_SHARED | MAP_FIXED, -1, 0);
        sprintf((char *)two + i * page, "object %d", i);
    }
    printf("two objects are @ %p\n", (void *)two);
}

int main(void)
{
size_t		bigBufferLen;
uint8_t		*bigBuffer;

bigBufferLen = 54321;

// Use anonymous mmap to ensure we get a single VM object.
bigBuffer = (uint8_t *) mmap(NULL, bigBufferLen, PROT_READ | PROT_WRITE, MAP_ANON | MAP_SHARED, -1, 0);
if (bigBuffer == MAP_FAILED) {
    perror("mmap() call error:");
}
else {
    // Success.
    printf("buffer is created @ %p\n", bigBuffer);
}

    char line[80];
    strcpy((char *)bigBuffer, "written by C");
    print_others();
    printf("pid is %d\n", getpid());
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        printf("buffer says: %s\n", (char *)bigBuffer);
        fflush(stdout);
    }
    return 0;
}
